"""Errors of libraries that only their text tells apart. All such texts stand here, each with a test.

Our own errors are known by their classes and fields (errors.py), and so is everything that has a class of its own.
"""

from __future__ import annotations

import errno
import sys
from typing import Literal

from hf_fasttrain.utils.errors import StepOutOfMemory

# What is said where memory is short. accelerate takes CUDNN_STATUS_NOT_SUPPORTED for it too, which has other causes.
OUT_OF_MEMORY = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "Cannot allocate memory",
    "std::bad_alloc",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "ALLOCATION_FAILED",
    # oneDNN, which has no other words for it, where there is no memory for its own buffers:
    "could not create a primitive",
    "could not execute a primitive",
)
# What libjpeg-turbo, Pillow and its readers say.
DECODER_OUT_OF_MEMORY = ("out of memory", "nsufficient memory", "std::bad_alloc", "allocate memory")
# What gloo says where another process's end of a connection is closed, and NCCL.
PEER_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
# Warnings of libjpeg, of which simplejpeg raises the first.
JPEG_DAMAGE = ("Corrupt JPEG data", "Premature end", "Inconsistent progression")
JPEG_HARMLESS = (
    "extraneous bytes",  # cameras, editors and webcams leave them
    "bad ICC marker",
    "Unknown Adobe color transform",
    "Invalid SOS parameters for sequential JPEG",  # they mean nothing there
    "Warning: ",  # unknown JFIF revision number, odd thumbnail
)
JPEG_TRUNCATED = "end of JPEG file"
JPEG_AT_END = "before marker 0xd9"  # of extraneous bytes

JpegWarning = Literal["harmless", "harmless at the end", "truncated", "damaged", "unknown"]


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error is that of a device, or of the host, without memory for the batch."""
    torch = sys.modules.get("torch")
    if isinstance(error, StepOutOfMemory | MemoryError) or (torch and isinstance(error, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and _says(error, *OUT_OF_MEMORY)


def is_decoder_out_of_memory(error: BaseException) -> bool:
    """Return whether an error of an image's decoder is that of a machine without memory for the pixels."""
    return isinstance(error, MemoryError) or _says(error, *DECODER_OUT_OF_MEMORY)


def is_peer_gone(error: BaseException) -> bool:
    """Return whether an error means that another training process has ended."""
    return isinstance(error, RuntimeError) and _says(error, *PEER_GONE)


def is_dead_worker(error: BaseException) -> bool:
    """Return whether an error of torch's DataLoader means that one of its processes has died."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid")


def is_remote_code_refused(error: BaseException) -> bool:
    """Return whether transformers did not open a model since it brings Python code of its own."""
    return isinstance(error, ValueError) and _says(error, "trust_remote_code")


def is_card_refused(error: BaseException) -> bool:
    """Return whether the Hub did not take a model card for what its header says."""
    return isinstance(error, ValueError) and _says(error, "Invalid metadata")


def jpeg_warning_kind(
    error: ValueError,
) -> Literal["harmless", "harmless at the end", "truncated", "damaged", "unknown"]:
    """Return what a warning of libjpeg means, which simplejpeg has raised as an error; at the end, nothing follows."""
    if _says(error, *JPEG_HARMLESS):
        return "harmless at the end" if _says(error, JPEG_AT_END) else "harmless"
    if _says(error, *JPEG_DAMAGE):
        return "truncated" if _says(error, JPEG_TRUNCATED) else "damaged"
    return "unknown"


def _says(error: BaseException, *texts: str) -> bool:
    said = str(error)
    return any(text in said for text in texts)
