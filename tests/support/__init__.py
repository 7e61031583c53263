"""What tests share: real processes on loopback ports, and trouble on demand."""
