"""Loggers: where the numbers of a run are written."""

from fasttrain.loggers.choice import make_loggers
from fasttrain.loggers.csv import CsvLogger
from fasttrain.loggers.jsonl import JsonlLogger
from fasttrain.loggers.tensorboard import TensorBoardLogger

__all__ = ["CsvLogger", "JsonlLogger", "TensorBoardLogger", "make_loggers"]
