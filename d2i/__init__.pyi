from d2i.dialog import Turn as Turn
from d2i.errors import GenerationError as GenerationError
from d2i.eval.loaded_model import Model as Model
from d2i.eval.loaded_model import load as load
from d2i.eval.system import Read as Read
from d2i.shards.map_dataset import Dataset as Dataset
from d2i.shards.map_dataset import webdataset as webdataset

__version__: str
__all__ = ["Dataset", "GenerationError", "Model", "Read", "Turn", "load", "webdataset"]
