"""The modules that stand for a user's blocks after `xattn_kernels.convert`.

Each is one of this library's modules that holds the block's own layers, and the block itself out of
sight of `nn.Module`. It computes in its own way as long as everything that the decision to swap
relied on is as it was. Otherwise the block's own `forward` runs, with the layers and attributes as
they are now: after a layer was dilated or replaced, an activation exchanged, an attribute of the
block set, on it or on the module that stands for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from xattn_kernels.convert.code import Code, Left, read_code
from xattn_kernels.convert.settings import (
    CALL_HOOKS,
    INTERNAL,
    LIBRARY,
    Settings,
    Watch,
    settings_of,
)
from xattn_kernels.modules import CrossAttention, CrossScaleHead, CrossTaskAttention
from xattn_kernels.modules.checks import in_format_of
from xattn_kernels.modules.layers import BasicBlock
from xattn_kernels.modules.row_sharding import rows_of

_MISSING = object()


class Original:
    """A user's block, and what it has in common with the module that stands for it.

    Layers are the same objects in both. The other modules of the block have counterparts, which
    take on their attributes, activations and hooks; what is set on a counterpart later reaches the
    block when it matters: before its `forward` runs, and when it is put back.

    Args:
        block: the user's.
        stand_in: what stands for it.
        arguments: names of the arguments of the block's `forward`.
        shared: paths of the layers.
    """

    def __init__(
        self, block: nn.Module, stand_in: nn.Module, arguments: Sequence[str], shared: Sequence[str]
    ) -> None:
        self.block = block
        self.stand_in = stand_in
        self.arguments = tuple(arguments)
        self._hooked = frozenset([*shared, ""])  # paths of modules whose hooks run
        self._own: dict[str, frozenset[str]] = {}  # attributes of counterparts alone
        self._seen: dict[str, dict[str, Any]] = {}  # their others, as the block has them
        self._relied_on: Settings | None = None
        self._watch: Watch | None = None
        self._is_changed = False
        for path, mine in [*stand_in.named_modules(remove_duplicate=False)]:
            if path not in shared:
                self._share(path, mine, block.get_submodule(path))

    def _share(self, path: str, mine: nn.Module, its: nn.Module) -> None:
        if isinstance(mine, CrossAttention):
            self._hooked |= {path}
        for hooks in CALL_HOOKS:  # the same dicts, so that handles can still remove them
            mine.__dict__[hooks] = its.__dict__[hooks]
        mine._is_full_backward_hook = its._is_full_backward_hook
        mine.training = its.training
        every = {**vars(its), **its._modules}
        self._own[path] = frozenset(vars(mine)) - every.keys()
        for name, value in every.items():
            if not hasattr(mine, name):
                mine.__dict__[name] = value
        self._seen[path] = self._common(path, mine)

    def rely_on_settings(self) -> None:
        """From now on, `is_changed` tells whether the settings are others than now.

        Raises:
            Left: if the block's code depends on more than these.
        """
        modules = dict(user_modules(self.block))
        self._relied_on = settings_of(modules, read_code(modules.values()), self._hooked)

    def is_changed(self) -> bool:
        """Whether something was changed that its stand-in does not know of."""
        if self._relied_on is None:
            return False
        if self._watch is None or not self._watch.holds():
            self._look()
        if self._is_changed:
            self._update_flags()
        return self._is_changed

    def updated(self) -> nn.Module:
        """The block, brought up to date."""
        self._update()
        self._update_flags()
        return self.block

    def _look(self) -> None:
        """Bring the block up to date and compare its settings with those relied on."""
        assert self._relied_on is not None
        self._update()
        modules = dict(user_modules(self.block))
        try:
            code = read_code(modules.values())
            now = settings_of(modules, code, self._hooked, self._relied_on.names)
            self._is_changed = now != self._relied_on
        except Left:
            code, self._is_changed = Code(None, ()), True
        mine = dict(self.stand_in.named_modules(remove_duplicate=False))
        hooks = frozenset(CALL_HOOKS)  # of its layers, which run, and those that both have
        ignored = {id(m): hooks | self._own.get(path, hooks) for path, m in mine.items()}
        self._watch = Watch([*mine.values(), *modules.values()], ignored, code)

    def _update(self) -> None:
        """Set on the block what was set on the counterparts of its modules."""
        for path in self._own:
            try:
                mine, its = self.stand_in.get_submodule(path), self.block.get_submodule(path)
            except AttributeError:  # a part of something that was replaced
                continue
            if mine is its:
                continue
            now, seen = self._common(path, mine), self._seen[path]
            for name, value in now.items():
                if seen.get(name, _MISSING) is not value:
                    setattr(its, name, value)
            for name in seen.keys() - now.keys():
                if hasattr(its, name):
                    delattr(its, name)
            self._seen[path] = now

    def _update_flags(self) -> None:
        """Have the block's modules train, and call hooks, as their counterparts do."""
        mine = dict(self.stand_in.named_modules(remove_duplicate=False))
        for path, module in self.block.named_modules(remove_duplicate=False):
            if path in mine:
                module._is_full_backward_hook = mine[path]._is_full_backward_hook
            while path not in mine:  # an activation: its mode is that of what it is in
                path = path.rpartition(".")[0]
            module.training = mine[path].training

    def _common(self, path: str, module: nn.Module) -> dict[str, Any]:
        """Attributes and children of a counterpart that the block has as well, or will have."""
        every = {**vars(module), **module._modules}
        hidden = INTERNAL | self._own[path]
        return {k: x for k, x in every.items() if k not in hidden and not k.startswith(LIBRARY)}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_watch": None}


class Converted(nn.Module):
    """A block of this library that stands for one of the user's and shares its layers."""

    _original: Original

    def stand_for(self, block: nn.Module, arguments: Sequence[str], shared: Sequence[str]) -> None:
        """Remember a block, out of sight of `nn.Module`; arguments as of `Original`."""
        self.__dict__["_original"] = None
        self.__dict__["_original"] = Original(block, self, arguments, shared)

    def rely_on_settings(self) -> None:
        """Run the block's `forward` whenever its settings will be others than now.

        Raises:
            Left: if its code depends on more than these.
        """
        self._original.rely_on_settings()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self._runs_original():
            return self._compute(*self._in_order(args, kwargs))
        if rows_of(self) is not None or self._original.stand_in is not self:
            raise RuntimeError(
                f"{type(self).__name__}: got a block that was changed after convert_, expected an "
                "unchanged one in shard_rows and in replicas of DataParallel: its own forward "
                "would not know of the other rows, or not find its layers"
            )
        return self._original.block.forward(*args, **kwargs)

    def _compute(self, *args: Any) -> Any:
        """What the block computes, in the library's way."""
        raise NotImplementedError

    @torch.compiler.assume_constant_result
    def _runs_original(self) -> bool:
        return self._original.is_changed()

    def release(self) -> nn.Module:
        """The block, brought up to date."""
        return self._original.updated()

    def _in_order(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """The arguments of a call by position, under the names that the block gives them."""
        if not kwargs:
            return args
        rest = self._original.arguments[len(args) :]
        if set(rest) != set(kwargs):
            raise TypeError(f"got arguments {list(kwargs)}, expected {list(rest)}")
        return (*args, *(kwargs[name] for name in rest))


def user_modules(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """A block and all modules in it by path; of swapped ones in it the originals as well."""
    if isinstance(module, Converted):
        yield from user_modules(module._original.block, f"{path}(original)")
        yield from ((f"{path}.{k}", m) for k, m in module.named_modules() if not m._modules)
        return
    yield path, module
    for name, child in module._modules.items():
        if child is not None:
            yield from user_modules(child, f"{path}.{name}" if path else name)


class ConvertedCrossAttention(Converted, CrossAttention):
    """`CrossAttention`, called as the original: target, source."""

    def _compute(self, *args: Any) -> Tensor:
        return CrossAttention.forward(self, *args)


class ConvertedCrossTaskAttention(Converted, CrossTaskAttention):
    """`CrossTaskAttention`, called as the original: with a dict that has `features_<task>`."""

    def _compute(self, *args: Any) -> dict[str, Tensor]:
        (given,) = args
        features = {task: given[f"features_{task}"] for task in self.auxiliary_tasks}
        return CrossTaskAttention.forward(self, features)


class ConvertedCrossScaleHead(Converted, CrossScaleHead):
    """`CrossScaleHead`, called as the original: with a list of scales, finest first."""

    def _compute(self, *args: Any) -> Tensor:
        return CrossScaleHead.forward(self, *args)


class ConvertedResidualBlock(Converted, BasicBlock):
    """`BasicBlock`, called as the original: with one map."""

    def _compute(self, *args: Any) -> Tensor:
        (x,) = args
        return in_format_of(BasicBlock.forward(self, x), x)
