"""Checkpoints on disk: safetensors files read by range and written shard by shard, never a whole model in memory."""
