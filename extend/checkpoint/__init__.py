"""Lazy safetensors in, sharded and atomic safetensors out. Imports no torch by itself."""

from extend.checkpoint.ahead import reading_ahead
from extend.checkpoint.header import (
    DTYPE_BYTES,
    FLOAT_DTYPES,
    TensorInfo,
    dtype_name,
    read_header,
    read_layout,
    torch_dtype,
)
from extend.checkpoint.read import INDEX_NAME, SINGLE_NAME, Checkpoint, StoredTensor
from extend.checkpoint.side_files import copy_side_files
from extend.checkpoint.write import MAX_SHARD_BYTES, write_checkpoint, write_safetensors

__all__ = ["DTYPE_BYTES", "FLOAT_DTYPES", "INDEX_NAME", "MAX_SHARD_BYTES", "SINGLE_NAME",
           "Checkpoint", "StoredTensor", "TensorInfo", "copy_side_files", "dtype_name",
           "read_header", "read_layout", "reading_ahead", "torch_dtype", "write_checkpoint",
           "write_safetensors"]
