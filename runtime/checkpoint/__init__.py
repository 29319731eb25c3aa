"""Checkpoints: a whole training state in a folder, which any plan of the same model can take up."""

from runtime.checkpoint.training import CheckpointInfo, load_training, read_info, save_training

__all__ = ["CheckpointInfo", "load_training", "read_info", "save_training"]
