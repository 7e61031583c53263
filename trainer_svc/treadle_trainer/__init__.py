"""The trainer: owns one device with one base, orders, merges, executes and journals the operations of many runs."""
