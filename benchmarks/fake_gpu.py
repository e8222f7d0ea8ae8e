"""A GPU that is not there: real code runs on tensors without memory, and what it would take is counted.

Tensors are torch's fake ones on the device "cuda". Every operation that the code comes to is seen below autograd and
autocast: what it allocates and frees gives the peak, by what it is for; matrix products are counted as torch's own
counter does. An operation on tensors of two devices raises, as on a GPU. A frozen 16-bit weight that is widened is
noted, and so is arithmetic on large tensors of the CPU.

Small tensors that follow from what the program itself wrote (ids, masks, lengths) are computed beside, so that whatever
depends on their values (boolean indices, `tolist`) goes as it would. What follows from weights is not known: as a
number it counts as 0, 1.0 or true. On a machine without CUDA the engine of autograd knows no such device: it is shown
"meta" instead, which it runs in the calling thread. The kernel of attention is chosen by the rules of a CUDA build.

Knows nothing of time, of kernels' own workspaces, of the allocator's fragments, or of what a CUDA context takes.
"""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
ROUNDED = 512
"""Bytes that the allocator rounds up to."""
SMALL = 1 << 18
"""Numbers of a tensor whose values are computed beside it."""
LARGE = 1 << 20
"""Numbers of a tensor that is a weight's, or worth a GPU."""
UNKNOWN = {torch.bool: True}
WIDENED = (torch.bfloat16, torch.float16)


class Trace(TorchDispatchMode):
    """What the code inside of `on_fake_gpu` comes to: bytes held by device and kind, at the GPU's peak, and FLOPs."""

    def __init__(self) -> None:
        super().__init__()
        self.kind = "activations"
        self.held: Counter[tuple[str, str]] = Counter()
        self.total: Counter[str] = Counter()
        self.peak: dict[str, int] = {}
        self.host_peak = 0
        self.flops = 0
        self.widened: Counter[str] = Counter()
        self.on_cpu: Counter[str] = Counter()
        self._storages: dict[int, tuple[Any, str, str, int]] = {}

    @property
    def peak_bytes(self) -> int:
        return sum(self.peak.values())

    def restart(self) -> None:
        """Count anew from what is held now."""
        self.flops, self.peak, self.host_peak = 0, self._of_gpu(), self.total["cpu"]

    @contextmanager
    def making(self, kind: str) -> Iterator[None]:
        """What is allocated meanwhile is of this kind."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    def tag(self, tensors: Iterable[Any], kind: str) -> None:
        """What these tensors hold is of this kind from now on."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            if key in self._storages:
                reference, device, before, size = self._storages[key]
                self.held[device, before] -= size
                self.held[device, kind] += size
                self._storages[key] = reference, device, kind, size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if torch.is_inference_mode_enabled() and func._overloadpacket not in flop_registry:
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        if func is aten._local_scalar_dense.default:
            return _number(args[0])
        if func in (aten.equal.default, aten.allclose.default):
            return _agree(func, args, kwargs)
        if func is aten.nonzero.default:
            return self._given(_really(torch.nonzero, _known(args[0], func)), args[0].device)
        if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            args = (args[0], self._integers(args[1], func), *args[2:])
        if func is aten._to_copy.default and _is_no_copy(args[0], kwargs):
            func, kwargs = aten.alias.default, {}
        out = func(*args, **kwargs)
        leaves = [leaf for leaf in tree_flatten(out)[0] if isinstance(leaf, torch.Tensor)]
        for tensor in leaves:
            self._hold(tensor)
        self._know(func, args, kwargs, leaves)
        self._count(func, args, kwargs, out, leaves)
        return out

    # ---- values -----------------------------------------------------------------------------------------------------

    def _given(self, values: torch.Tensor, device: Any) -> Any:
        """A fake tensor of these values."""
        fake = torch.empty(values.shape, dtype=values.dtype, device=device)
        fake.known = values
        self._hold(fake)
        return fake

    def _integers(self, indices: Any, func: Any) -> list[Any]:
        """Indices, boolean ones as the integers that they stand for."""
        integers: list[Any] = []
        for index in indices:
            if index is not None and index.dtype is torch.bool:
                values = _really(torch.nonzero, _known(index, func), as_tuple=True)
                integers += [self._given(value, index.device) for value in values]
            else:
                integers.append(index)
        return integers

    def _know(self, func: Any, args: Any, kwargs: Any, leaves: list[Any]) -> None:
        """Compute the values of small tensors beside, where all that they follow from is known."""
        flat = tree_flatten((args, kwargs))[0]
        given = [leaf for leaf in flat if isinstance(leaf, torch.Tensor)]
        wanted = bool(leaves) and all(leaf.numel() <= SMALL for leaf in leaves)
        wanted &= all(_value(tensor) is not None for tensor in given)
        if not given:  # a factory; drawn numbers and large floats are nobody's decision
            wanted &= all(not leaf.is_floating_point() or leaf.numel() == 1 for leaf in leaves)
            wanted &= "empty" not in func._schema.name
        if not wanted or torch.Tag.nondeterministic_seeded in func.tags:
            for argument, value in zip(func._schema.arguments, args, strict=False):
                if argument.alias_info and argument.alias_info.is_write and isinstance(value, FakeTensor):
                    value.known = None
            return

        def real(leaf: Any) -> Any:
            if isinstance(leaf, torch.Tensor):
                return _value(leaf)
            return torch.device("cpu") if isinstance(leaf, torch.device) else leaf

        values = _really(func, *tree_map(real, args), **tree_map(real, kwargs))
        if func in (aten.lift_fresh.default, aten.lift.default):
            values = _really(torch.clone, values)
        for leaf, value in zip(leaves, tree_flatten(values)[0], strict=True):
            if isinstance(leaf, FakeTensor):
                leaf.known = value

    # ---- memory -----------------------------------------------------------------------------------------------------

    def _hold(self, tensor: Any) -> None:
        storage = tensor.untyped_storage()
        key, device = storage._cdata, tensor.device.type
        if key in self._storages and self._storages[key][0]() is not None:
            return
        size, kind = -(-storage.nbytes() // ROUNDED) * ROUNDED, self.kind

        def freed(reference: Any) -> None:
            entry = self._storages.get(key)
            if entry is not None and entry[0] is reference:
                del self._storages[key]
                self.held[entry[1], entry[2]] -= entry[3]
                self.total[entry[1]] -= entry[3]

        self._storages[key] = weakref.ref(storage, freed), device, kind, size
        self.held[device, kind] += size
        self.total[device] += size
        if device == "cuda" and self.total[device] > self.peak_bytes:
            self.peak = self._of_gpu()
        self.host_peak = max(self.host_peak, self.total["cpu"])

    def _of_gpu(self) -> dict[str, int]:
        return {kind: size for (device, kind), size in self.held.items() if device == "cuda" and size}

    # ---- arithmetic -------------------------------------------------------------------------------------------------

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any, leaves: list[Any]) -> None:
        formula = flop_registry.get(_out_of_place(func))
        if formula:
            self.flops += formula(*args, **kwargs, out_val=out)
        for tensor in leaves:
            if tensor.numel() < LARGE or not tensor.is_floating_point():
                continue
            if tensor.device.type == "cpu" and (formula or (args and _is_on_gpu(args[0]))):
                self.on_cpu[func._schema.name] += tensor.numel() * tensor.element_size()
            if func is aten._to_copy.default and tensor.dtype is torch.float32 and self._is_weight(args[0]):
                self.widened[str(tuple(tensor.shape))] += 1

    def _is_weight(self, tensor: Any) -> bool:
        entry = self._storages.get(tensor.untyped_storage()._cdata)
        return tensor.dtype in WIDENED and entry is not None and entry[2] == "weights"


@cache
def _out_of_place(func: Any) -> Any:
    """The operation whose FLOPs are known: those of `addmm_` are those of `addmm`."""
    return getattr(aten, func._overloadpacket.__name__.removesuffix("_"), None)


def _really(function: Any, *arguments: Any, **keywords: Any) -> Any:
    with _disable_current_modes(), torch.no_grad():
        return function(*arguments, **keywords)


def _value(tensor: Any) -> Any:
    """The values of a tensor, None where they are not known."""
    return getattr(tensor, "known", None) if isinstance(tensor, FakeTensor) else tensor


def _known(tensor: Any, func: Any) -> Any:
    value = _value(tensor)
    assert value is not None, f"{func}: its size depends on the values of a tensor that is not known here"
    return value


def _number(tensor: Any) -> Any:
    value = _value(tensor)
    if value is not None:
        return _really(torch.Tensor.item, value)
    return UNKNOWN.get(tensor.dtype, 1.0 if tensor.is_floating_point() else 0)


def _agree(func: Any, args: Any, kwargs: Any) -> bool:
    values = [_value(tensor) for tensor in args[:2]]
    return values[0] is None or values[1] is None or bool(_really(func, *values, *args[2:], **kwargs))


def _is_on_gpu(tensor: Any) -> bool:
    return isinstance(tensor, torch.Tensor) and tensor.device.type == "cuda"


def _is_no_copy(tensor: Any, kwargs: dict[str, Any]) -> bool:
    """Whether `to` asks for what is there: C++ has decided by the device that it was shown."""
    device, dtype = kwargs.get("device") or tensor.device, kwargs.get("dtype") or tensor.dtype
    return bool(device.type == tensor.device.type == "cuda" and dtype == tensor.dtype)


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """`scaled_dot_product_attention` on a CUDA build: flash attention without a mask, the memory-efficient with one."""
    if attn_mask is None and query.dtype in WIDENED:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if enable_gqa:
        key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], 1) for states in (key, value))
    if attn_mask is not None:
        if attn_mask.dtype is torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
        attn_mask = attn_mask.expand(*query.shape[:2], *attn_mask.shape[2:])
    graph = torch.is_grad_enabled() and any(states.requires_grad for states in (query, key, value))
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, graph, dropout_p, is_causal, scale=scale
    )[0]


class _Autocast:
    """What autocast does to matrix products, for C++ takes tensors that it is shown as "meta" for none of its own.

    Trained float32 weights are cast once, and the copies are kept until the outermost autocast ends.
    """

    def __init__(self) -> None:
        self.copies: dict[int, tuple[Any, Any]] = {}

    def around(self, function: Any) -> Any:
        def cast(*arguments: Any, **keywords: Any) -> Any:
            if not torch.is_autocast_enabled("cuda"):
                return function(*arguments, **keywords)
            return function(*map(self._cast, arguments), **{key: self._cast(one) for key, one in keywords.items()})

        return cast

    def _cast(self, tensor: Any) -> Any:
        dtype = torch.get_autocast_dtype("cuda")
        if not _is_on_gpu(tensor) or not tensor.is_floating_point() or tensor.dtype is dtype:
            return tensor
        if not (tensor.requires_grad and tensor.is_leaf):
            return tensor.to(dtype)
        if id(tensor) not in self.copies:
            self.copies[id(tensor)] = tensor, tensor.to(dtype)
        return self.copies[id(tensor)][1]


class _Untouched(FakeTensorMode):
    """Nothing is begun on a GPU, though there seems to be one."""

    avoid_device_init = True

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        device = (kwargs or {}).get("device")
        if device is not None and device.type == "meta":  # what C++ was shown
            kwargs = {**kwargs, "device": CUDA}
        return super().dispatch(func, types, args, kwargs or {})


@contextmanager
def on_fake_gpu() -> Iterator[Trace]:
    """Run what is inside on a GPU that is not there. Not to be nested."""
    with suppress(ImportError):
        import bitsandbytes  # noqa: F401  peft loads it, and it looks for a GPU where it is loaded
    trace, mode = Trace(), _Untouched(allow_non_fake_inputs=True)
    autocast = _Autocast()
    make, swap = torch.Tensor._make_subclass, torch.utils.swap_tensors

    def shown_as_meta(cls: Any, elem: Any, *arguments: Any, **keywords: Any) -> Any:
        if cls is FakeTensor and keywords["device_for_backend_keys"].type == "cuda":
            keywords["dispatch_device"] = False
        return make(cls, elem, *arguments, **keywords)

    def swapped(first: Any, second: Any) -> None:
        mode.fake_tensor_converter.meta_converter.tensor_memo.clear()  # its weak references would forbid it
        swap(first, second)

    def stepped(optimizer: Any, *_: Any) -> None:
        tensors = (value for state in optimizer.state.values() for value in state.values())
        trace.tag((tensor for tensor in tensors if isinstance(tensor, torch.Tensor)), "optimiser")

    handle = register_optimizer_step_post_hook(stepped)
    try:
        with ExitStack() as stack:
            for place, name, value in (
                (torch.Tensor, "_make_subclass", staticmethod(shown_as_meta)),
                (torch.utils, "swap_tensors", swapped),
                (torch.nn.functional, "scaled_dot_product_attention", autocast.around(_attention)),
                (torch.nn.functional, "linear", autocast.around(torch.nn.functional.linear)),
                (torch, "matmul", autocast.around(torch.matmul)),
                (torch, "bmm", autocast.around(torch.bmm)),
                (torch, "clear_autocast_cache", autocast.copies.clear),
                (torch.cuda, "is_available", lambda: True),
                (torch.cuda, "is_bf16_supported", lambda *_: True),
                (torch.cuda, "current_device", lambda: 0),
                (torch.cuda, "device_count", lambda: 1),
                (torch.cuda, "is_current_stream_capturing", lambda: False),
            ):
                stack.enter_context(patch.object(place, name, value))
            stack.enter_context(mode)
            stack.enter_context(trace)
            yield trace
    finally:
        handle.remove()
