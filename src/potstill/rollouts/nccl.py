"""NCCL's own library, as far as one process sends tensors to others: a communicator of which this one is rank 0. Knows no vLLM.

The rendezvous is NCCL's unique id, 128 bytes that travel over HTTP: no store, no further port of ours, and no pickle.
"""

import base64
import ctypes
import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from potstill.errors import GeneratorError

_ID_BYTES = 128
_TYPES = {
    torch.int8: 0, torch.uint8: 1, torch.int32: 2, torch.int64: 4, torch.float16: 6, torch.float32: 7, torch.float64: 8, torch.bfloat16: 9,
}  # fmt: skip
_SUM = 0


class _UniqueId(ctypes.Structure):
    _fields_ = [("internal", ctypes.c_byte * _ID_BYTES)]


def _library() -> ctypes.CDLL:
    """The library that torch itself has loaded, or was installed with."""
    found = importlib.util.find_spec("nvidia.nccl") if importlib.util.find_spec("nvidia") else None
    folders = [Path(place) / "lib" for place in (found.submodule_search_locations or [])] if found else []
    for name in [*(str(folder / "libnccl.so.2") for folder in folders), "libnccl.so.2"]:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise GeneratorError(
        "rollouts.generator.weights: push needs NCCL (libnccl.so.2), which is not here; use adapter or reload, or a torch built with CUDA"
    )


class Sender:
    """Rank 0 of `world_size` processes. Made in two steps: the id is there at once, `join` waits for all others."""

    def __init__(self, device: torch.device):
        if device.type != "cuda":
            raise GeneratorError(
                f"rollouts.generator.weights: push sends the student's weights over NCCL, and the student is on {device}; "
                "use adapter or reload"
            )
        self._device, self._nccl = device, _library()
        self._comm = ctypes.c_void_p()
        self._id = _UniqueId()
        self._check(self._nccl.ncclGetUniqueId(ctypes.byref(self._id)))

    @property
    def unique_id(self) -> str:
        """Standard base64 of the 128 bytes."""
        return base64.b64encode(bytes(self._id)).decode()

    def join(self, world_size: int) -> None:
        """Until all are there. One number is summed at once, as vLLM's workers do when they have joined."""
        with torch.cuda.device(self._device):
            self._nccl.ncclCommInitRank.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_int, _UniqueId, ctypes.c_int]
            self._check(self._nccl.ncclCommInitRank(ctypes.byref(self._comm), world_size, self._id, 0))
            one = torch.zeros(1, device=self._device)
            pointer = ctypes.c_void_p(one.data_ptr())
            self._check(self._nccl.ncclAllReduce(pointer, pointer, ctypes.c_size_t(1), _TYPES[one.dtype], _SUM, self._comm, self._stream()))
            self.finish()

    def send(self, tensor: Tensor) -> None:
        """To all others, once the stream comes to it. `tensor` must live until `finish`, and lie in memory without gaps."""
        assert tensor.is_contiguous()
        pointer, count = ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.numel())
        self._check(self._nccl.ncclBroadcast(pointer, pointer, count, _TYPES[tensor.dtype], 0, self._comm, self._stream()))

    def finish(self) -> None:
        """Until everything has been sent."""
        torch.cuda.current_stream(self._device).synchronize()

    def close(self, *, broken: bool = False) -> None:
        """`broken`: without waiting for those who may have gone."""
        if self._comm:
            (self._nccl.ncclCommAbort if broken else self._nccl.ncclCommDestroy)(self._comm)
            self._comm = ctypes.c_void_p()

    def _stream(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(torch.cuda.current_stream(self._device).cuda_stream)

    def _check(self, code: int) -> None:
        if code:
            self._nccl.ncclGetErrorString.restype = ctypes.c_char_p
            words = self._nccl.ncclGetErrorString(code).decode()
            raise GeneratorError(f"rollouts.generator.weights: push: NCCL says {words!r}; NCCL_DEBUG=INFO says more")
