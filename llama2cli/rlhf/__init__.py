"""The maths of reward models and of reinforcement learning from human feedback: pure functions on tensors."""
