"""transformers' ``use_kernels=True`` served from this package, without the hub.

    from trinorm.integrations.transformers import register

    registered = register()
    model = AutoModelForCausalLM.from_pretrained(..., use_kernels=True)
    print(registered.patched(model))

transformers decorates norms with the name of a layer, and the package kernels looks that name up in a mapping of devices to
layers, and puts the layer's forward on the module. Here the layers (:mod:`trinorm.integrations.layers`) are put into that
mapping, over an interval of compute capabilities that is narrower by one than the one of transformers' own entries: the
narrower wins, and still does after each ``.train()`` and ``.eval()``, at which transformers registers its own anew.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .. import __version__
from ..models.convert import Left, Replaced, Report, is_norm, name_of
from ..models.forms import Form
from .layers import LAYERS, form_of

# Where kernels may be told to look for a layer. Its other devices have no kernels of trinorm's.
DEVICES = ("cuda", "rocm", "cpu")


@dataclass(frozen=True)
class Installed:
    """A layer of this package, where kernels has one of a repository on the hub: what it asks of such is that it loads."""

    layer_name: str

    def load(self) -> type[nn.Module]:
        return LAYERS[self.layer_name]

    def __str__(self) -> str:
        return f"trinorm {__version__}, layer {self.layer_name}"


@dataclass(frozen=True)
class Registered:
    """What ``register`` has put into kernels' mapping: layers, by the names that transformers' norms are decorated with."""

    layers: tuple[str, ...]
    devices: tuple[str, ...]
    transformers: str
    kernels: str

    def patched(self, model: nn.Module) -> Report:
        """What kernels has put these layers on, in a model that was made or loaded with ``use_kernels=True``.

        Returns:
            A :class:`trinorm.Report`: a norm that is ``replaced`` is computed by trinorm, in the dtypes in which it is what
            the module's class computes; one that is ``left`` is not, for the reason given.
        """
        replaced, left = [], []
        for path, module in model.named_modules(remove_duplicate=False):
            kind, found = name_of(type(module)), _found(module)
            if isinstance(found, Form):
                replaced.append(Replaced(path, kind, str(found)))
            elif is_norm(module):
                left.append(Left(path, kind, found))
        return Report(tuple(replaced), tuple(left), by="register")


def register(devices: Sequence[str] = ("cuda",)) -> Registered:
    """Serve transformers' models of ``use_kernels=True`` from this package: RMSNorm, RMSNormGated and RMSNormZeroCentered.

    For models that are made, loaded, or brought into training or evaluation from now on; those that were before keep what
    they have until ``.train()`` or ``.eval()`` changes their mode. For training and inference, compiled or not. What a
    layer computes is found out for each class of modules, by what its own forward computes
    (:mod:`trinorm.integrations.layers`); a class that is no norm of trinorm's keeps its own forward, and
    :meth:`Registered.patched` says so.

    Norms that transformers does not decorate (Gemma's, T5's, ``nn.LayerNorm``) are not reached, and what else it decorates
    (activations, rotary embeddings) kernels goes on to fetch from the hub: :func:`trinorm.replace` takes all norms, and
    needs neither kernels, nor ``use_kernels``, nor the hub.

    Args:
        devices: of ``"cuda"``, ``"rocm"`` and ``"cpu"``; on the last trinorm computes by torch's own operators.

    Raises:
        ImportError: transformers or kernels is not installed; the message says which versions to install.
        RuntimeError: nothing would be patched. transformers takes some versions of kernels only, and makes its decorators
            stubs, without a word, where another is installed; ``USE_HUB_KERNELS`` and ``DISABLE_KERNEL_MAPPING`` in the
            environment switch them off too.
        ValueError: ``devices`` has something else.
    """
    if isinstance(devices, str) or not set(devices) <= set(DEVICES):
        raise ValueError(f"register(): devices must be a sequence of {', '.join(DEVICES)}, not {devices!r}")
    versions = _checked()
    from kernels import CUDAProperties, Device, Mode, register_kernel_mapping
    from kernels.layer.device import ROCMProperties

    unregister()
    interval = dict(min_capability=1, max_capability=sys.maxsize - 1)
    keys = {
        "cuda": Device("cuda", CUDAProperties(**interval)),
        "rocm": Device("rocm", ROCMProperties(**interval)),
        "cpu": Device("cpu"),
    }
    modes = [mode | more for mode in (Mode.INFERENCE, Mode.TRAINING) for more in (mode, Mode.TORCH_COMPILE)]
    register_kernel_mapping(
        {name: {keys[device]: dict.fromkeys(modes, Installed(name)) for device in devices} for name in LAYERS}
    )
    return Registered(tuple(LAYERS), tuple(devices), *versions)


def unregister(*models: nn.Module) -> None:
    """Undo :func:`register`, and in these models what kernels has made of it: their norms get their own forward back.

    For a GPU kernels goes by what else it knows; for the CPU it keeps one layer of a name, and knew none of these.
    """
    if "kernels" in sys.modules:
        from kernels.layer.globals import _KERNEL_MAPPING

        for of_devices in map(_KERNEL_MAPPING.get().get, LAYERS):
            for device, repositories in list((of_devices or {}).items()):
                of_devices[device] = _without_ours(repositories)
    ours = {layer.forward for layer in LAYERS.values()}
    for module in (module for model in models for module in model.modules()):
        if getattr(vars(module).get("forward"), "__func__", None) in ours:
            del module.forward


def _without_ours(repositories: Any) -> Any:
    """kernels has no way to take a layer out of what it knows for a device: all others are put into a new one."""
    kept = type(repositories)()
    if (tree := getattr(repositories, "repos_by_capability", None)) is not None:
        for node in _nodes(tree.root):
            if not _is_ours(node.data):
                kept.repos_by_capability.insert(node.start, node.end, node.data)
        return kept
    return kept if _is_ours(repositories.repos) else repositories


def _nodes(root: Any) -> Iterator[Any]:
    if root is not None:
        yield from (*_nodes(root.left), root, *_nodes(root.right))


def _is_ours(of_modes: dict[Any, Any]) -> bool:
    return any(isinstance(repository, Installed) for repository in of_modes.values())


def _checked() -> tuple[str, str]:
    """The versions of transformers and of kernels, which work together."""
    try:
        import transformers
        from transformers.integrations.hub_kernels import use_kernel_forward_from_hub
        from transformers.utils import import_utils
    except ImportError as error:
        raise ImportError(f"register() needs transformers, 5.17 or newer: pip install transformers ({error})") from error
    needs = f"kernels>={import_utils.KERNELS_MIN_VERSION},<{import_utils.KERNELS_MAX_VERSION}"
    try:
        import kernels
    except ImportError as error:
        raise ImportError(
            f"register() needs what transformers {transformers.__version__} takes: pip install '{needs}' ({error})"
        ) from error
    instead = "trinorm.replace(model) needs no kernels"
    if not import_utils.is_kernels_available():
        raise RuntimeError(
            f"register(): no norm would be patched: transformers {transformers.__version__} takes {needs}, and with "
            f"kernels {kernels.__version__} its decorators are stubs; pip install '{needs}', or {instead}"
        )
    probe = use_kernel_forward_from_hub("RMSNorm")(type("Probe", (nn.Module,), {}))
    if not hasattr(probe, "kernel_layer_name") or kernels.layer.globals._DISABLE_KERNEL_MAPPING:
        raise RuntimeError(
            "register(): no norm would be patched: USE_HUB_KERNELS or DISABLE_KERNEL_MAPPING in the environment switches "
            f"kernels off; unset it, or {instead}"
        )
    return transformers.__version__, kernels.__version__


def _found(module: nn.Module) -> Form | str:
    """What a module computes by a layer of ours; or why it does not."""
    name = getattr(type(module), "kernel_layer_name", None)
    forward = getattr(vars(module).get("forward"), "__func__", None)
    if name is None:
        return "its class has no decorator of kernels"
    if forward is None:
        return "kernels has not been asked for it: its model is not of use_kernels=True"
    if name not in LAYERS or (forward is not LAYERS[name].forward and forward is not type(module).forward):
        return f"it has the layer {name} of {forward.__module__}"
    if forward is type(module).forward:
        return f"kernels has no layer {name} for its device and mode"
    return form_of(module, LAYERS[name])
