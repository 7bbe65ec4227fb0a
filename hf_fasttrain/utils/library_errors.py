"""Errors of libraries that can be recognised only by their message. All such messages stand here, each with a test.

Errors of this package are recognised by class and fields (errors.py), as are library errors that have their own class.
"""

from __future__ import annotations

import errno
import sys
from typing import Literal

from hf_fasttrain.utils.errors import StepOutOfMemory

# Out of memory. accelerate counts CUDNN_STATUS_NOT_SUPPORTED too, which has other causes.
OUT_OF_MEMORY = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "Cannot allocate memory",
    "std::bad_alloc",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "ALLOCATION_FAILED",
    # oneDNN says nothing more specific when it can't allocate its buffers:
    "could not create a primitive",
    "could not execute a primitive",
)
# Messages of glibc's loader, when a shared library does not fit into the memory that a process may have.
LOADER_OUT_OF_MEMORY = ("failed to map segment from shared object", "cannot allocate memory", "cannot map zero-fill")
# Messages of libjpeg-turbo, Pillow and its plugins.
DECODER_OUT_OF_MEMORY = ("out of memory", "nsufficient memory", "std::bad_alloc", "allocate memory")
# Messages of gloo and NCCL when the other process's end of a connection is closed.
PEER_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
# Warnings of libjpeg; simplejpeg raises the first one as an error.
JPEG_DAMAGE = ("Corrupt JPEG data", "Premature end", "Inconsistent progression")
JPEG_HARMLESS = (
    "extraneous bytes",  # written by cameras, editors and webcams
    "bad ICC marker",
    "Unknown Adobe color transform",
    "Invalid SOS parameters for sequential JPEG",  # these parameters are ignored in sequential JPEGs
    "Warning: ",  # unknown JFIF revision number, odd thumbnail
)
JPEG_TRUNCATED = "end of JPEG file"
JPEG_AT_END = "before marker 0xd9"  # of extraneous bytes

JpegWarning = Literal["harmless", "harmless at the end", "truncated", "damaged", "unknown"]


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that the device or the host is out of memory."""
    torch = sys.modules.get("torch")
    if isinstance(error, StepOutOfMemory | MemoryError) or (torch and isinstance(error, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and _mentions(error, *OUT_OF_MEMORY)


def loader_out_of_memory(error: ImportError) -> str | None:
    """Return the line about a library that could not be loaded as this process may not have so much memory."""
    lines = (line.strip() for line in str(error).splitlines())  # numpy adds a page of advice
    return next((line for line in lines if any(text in line for text in LOADER_OUT_OF_MEMORY)), None)


def is_decoder_out_of_memory(error: BaseException) -> bool:
    """Return whether an error of an image decoder means that the machine is out of memory."""
    return isinstance(error, MemoryError) or _mentions(error, *DECODER_OUT_OF_MEMORY)


def is_peer_gone(error: BaseException) -> bool:
    """Return whether an error means that another training process has ended."""
    return isinstance(error, RuntimeError) and _mentions(error, *PEER_GONE)


def is_dead_worker(error: BaseException) -> bool:
    """Return whether an error means that a worker process of a torch DataLoader has died."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid")


def is_remote_code_refused(error: BaseException) -> bool:
    """Return whether transformers refused a model because it needs its own Python code (trust_remote_code)."""
    return isinstance(error, ValueError) and _mentions(error, "trust_remote_code")


def is_card_refused(error: BaseException) -> bool:
    """Return whether the Hub refused a model card because of its metadata."""
    return isinstance(error, ValueError) and _mentions(error, "Invalid metadata")


def jpeg_warning_kind(
    error: ValueError,
) -> JpegWarning:
    """Return what a libjpeg warning, which simplejpeg raises as an error, means for the image."""
    if _mentions(error, *JPEG_HARMLESS):
        return "harmless at the end" if _mentions(error, JPEG_AT_END) else "harmless"
    if _mentions(error, *JPEG_DAMAGE):
        return "truncated" if _mentions(error, JPEG_TRUNCATED) else "damaged"
    return "unknown"


def _mentions(error: BaseException, *texts: str) -> bool:
    message = str(error)
    return any(text in message for text in texts)
