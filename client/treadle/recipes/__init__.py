"""Ready loops over the SDK: supervised fine-tuning and reinforcement learning, short enough to copy and change."""
