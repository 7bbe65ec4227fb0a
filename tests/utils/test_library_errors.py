"""Errors recognised by their text: each known text of a library, and texts that must not match."""

from __future__ import annotations

import pytest
import torch
from transformers.dynamic_module_utils import resolve_trust_remote_code

from hf_fasttrain.utils.errors import NotEnoughMemory, StepOutOfMemory, edit_distance, first_line, nearest
from hf_fasttrain.utils.library_errors import (
    is_card_refused,
    is_dead_worker,
    is_decoder_out_of_memory,
    is_out_of_memory,
    is_peer_gone,
    is_remote_code_refused,
    jpeg_warning_kind,
)


@pytest.mark.parametrize(
    "text",
    ["CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)",
     "CUDNN_STATUS_ALLOCATION_FAILED", "DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes",
     "[enforce fail at alloc_cpu.cpp:132] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes",
     "unable to mmap 9 bytes from file </x>: Cannot allocate memory (12)", "std::bad_alloc",
     "could not create a primitive", "could not execute a primitive"],
)  # fmt: skip
def test_other_messages_of_out_of_memory(text: str) -> None:
    assert is_out_of_memory(RuntimeError(text))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(ValueError(text))


def test_exception_classes_of_out_of_memory() -> None:
    for error in (MemoryError(), torch.OutOfMemoryError(), StepOutOfMemory("1 of 2"), OSError(12, "")):
        assert is_out_of_memory(error)
    assert not is_out_of_memory(OSError(28, "out of memory"))
    assert not is_out_of_memory(NotEnoughMemory("out of memory at step 2"))  # it has been handled


@pytest.mark.parametrize(
    "text", ["out of memory", "Insufficient memory (case 4)", "std::bad_alloc", "can't allocate memory"]
)
def test_decoders_without_memory(text: str) -> None:
    assert is_decoder_out_of_memory(ValueError(text))
    assert is_decoder_out_of_memory(MemoryError())
    assert not is_decoder_out_of_memory(ValueError("broken data stream"))


@pytest.mark.parametrize(
    "text",
    ["[..] Connection closed by peer [127.0.0.1]:15275", "remote process exited or there", "[..] Broken pipe",
     "read: Connection reset by peer"],
)  # fmt: skip
def test_backends_messages_about_a_dead_process(text: str) -> None:
    assert is_peer_gone(RuntimeError(text))
    assert not is_peer_gone(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_peer_gone(ValueError(text))


def test_a_loaders_message_about_its_dead_process() -> None:
    assert is_dead_worker(RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. \n"))
    assert is_dead_worker(RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"))
    assert not is_dead_worker(RuntimeError("Caught RuntimeError in DataLoader worker process 0."))


def test_transformers_message_about_a_models_code() -> None:
    with pytest.raises(ValueError, match="custom code") as refused:
        resolve_trust_remote_code(False, "owner/model", has_local_code=False, has_remote_code=True)
    assert is_remote_code_refused(refused.value)
    assert not is_remote_code_refused(ValueError("Unrecognized model in owner/model"))


def test_the_hubs_message_about_a_card() -> None:
    assert is_card_refused(ValueError('Invalid metadata in README.md.\n- "license" must be one of ...'))
    assert not is_card_refused(RuntimeError("Invalid metadata"))


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Corrupt JPEG data: 3 extraneous bytes before marker 0xd9", "harmless at the end"),
        ("Corrupt JPEG data: 3 extraneous bytes before marker 0xdb", "harmless"),
        ("Corrupt JPEG data: bad ICC marker", "harmless"),
        ("Unknown Adobe color transform code 3", "harmless"),
        ("Invalid SOS parameters for sequential JPEG", "harmless"),
        ("Warning: unknown JFIF revision number 2.01", "harmless"),
        ("Corrupt JPEG data: premature end of data segment", "damaged"),
        ("Premature end of JPEG file", "truncated"),
        ("Inconsistent progression sequence for component 0 coefficient 1", "damaged"),
        ("Unsupported marker type 0xc9", "unknown"),
    ],
)
def test_libjpegs_warnings(text: str, kind: str) -> None:
    assert jpeg_warning_kind(ValueError(text)) == kind


def test_first_lines_of_errors() -> None:
    assert first_line(RuntimeError("\none\ntwo")) == "one"
    assert first_line(RuntimeError()) == "RuntimeError"


def test_the_nearest_name_needs_the_fewest_edits() -> None:
    names = ["efficientnet_b8", "efficientnet_b0", "efficientnet_lite0", "resnet18"]
    assert nearest("efficientnet_bo", names) == " Did you mean 'efficientnet_b0'?"
    assert nearest("resnet1B", names) == " Did you mean 'resnet18'?"
    assert not nearest("vit", names)
    assert [edit_distance(a, b) for a, b in (("", "ab"), ("kitten", "sitting"), ("same", "same"))] == [2, 3, 0]
