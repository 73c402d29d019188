"""Which models are measured, as data: in their real sizes, with nothing to download, and in toy sizes to try it out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shape = tuple[int, ...]
Arguments = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A model, what it is called with, and what is timed of it.

    build: of so many layers (None: as many as it has), in toy sizes or its own. inputs: the arguments of its forward, of a
    shape. loss: what is trained; None is a forward alone, without gradients. shape: of what is timed. compared: of what is
    compared with the fp32 model; None is the one that is timed. layers: as it is; few: as it is compiled whole in a quick
    run, which says so; a model that has layers and no few is not. autocast: fp32 weights under autocast to bf16, else bf16
    weights. last: images' channels, in memory. before: what restores the arguments before each step, untimed. without:
    columns that make no sense here.
    """

    title: str
    build: Callable[[int | None, bool], nn.Module]
    inputs: Callable[[nn.Module, Shape], Arguments]
    shape: Shape
    tiny: Shape
    loss: Callable[[Any], Tensor] | None = None
    what: str = "training"
    compared: Shape | None = None
    layers: int | None = None
    few: int | None = None
    autocast: bool = False
    last: bool = False
    before: Callable[[Arguments], None] | None = None
    without: tuple[str, ...] = ()


class Residual(nn.Module):
    """GroupNorm, SiLU and a convolution, twice, with a time embedding between them: a UNet's; or none: a VAE's."""

    def __init__(self, channels: int, embedding: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.GroupNorm(32, channels) for _ in range(2))
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.time = nn.Linear(embedding, channels) if embedding else None

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        h = self.norm1(x)
        h = F.silu(h)
        h = self.conv1(h)
        if self.time is not None and t is not None:
            h = h + self.time(F.silu(t))[:, :, None, None]
        h = self.norm2(h)
        h = F.silu(h)
        h = self.conv2(h)
        return x + h


class Bottleneck(nn.Module):
    """ResNet's, as torchvision writes it."""

    def __init__(self, entering: int, inner: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(entering, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, 4 * inner, 1, bias=False), nn.BatchNorm2d(4 * inner)
        self.relu = nn.ReLU(inplace=True)
        alike = stride == 1 and entering == 4 * inner
        way = (nn.Conv2d(entering, 4 * inner, 1, stride, bias=False), nn.BatchNorm2d(4 * inner))
        self.downsample = None if alike else nn.Sequential(*way)

    def forward(self, x: Tensor) -> Tensor:
        identity = x

        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)

        out = self.conv2(out)
        out = self.bn2(out)
        out = self.relu(out)

        out = self.conv3(out)
        out = self.bn3(out)

        if self.downsample is not None:
            identity = self.downsample(x)

        out += identity
        return self.relu(out)


class ResNet50(nn.Module):
    def __init__(self, depths: Shape = (3, 4, 6, 3), width: int = 64) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        blocks, entering = [], width
        for stage, depth in enumerate(depths):
            inner = width << stage
            for i in range(depth):
                blocks.append(Bottleneck(entering, inner, 2 if i == 0 and stage > 0 else 1))
                entering = 4 * inner
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(entering, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.stem(x))), 3, 2, 1)
        return self.head(self.blocks(x).mean((2, 3)))


# --- how each is built ---


def _transformers(
    head: str, config: str, sizes: dict[str, Any], tiny: dict[str, Any], depth: str = "num_hidden_layers"
) -> Callable[[int | None, bool], nn.Module]:
    """A model of transformers, from its configuration's class; its own dtype is bf16. depth: what its layers are called."""

    def build(layers: int | None, small: bool) -> nn.Module:
        import transformers

        chosen = {**sizes, **(tiny if small else {}), **({depth: layers} if layers else {})}
        made = getattr(transformers, config)(**chosen)
        model = getattr(transformers, head).from_config(made, attn_implementation="sdpa", dtype=torch.bfloat16)
        # GPT-2's has none, by its class's name: the default is this one too, but a warning of it breaks a graph.
        model.loss_type = model.loss_type or "ForCausalLM"
        return model

    return build


def _convnext(layers: int | None, small: bool) -> nn.Module:
    import timm

    return timm.create_model("convnext_tiny", **dict(depths=(1, 1, 1, 1), dims=(32, 32, 32, 32)) if small else {})


def _resnet(layers: int | None, small: bool) -> nn.Module:
    return ResNet50((1, 1, 1, 1), 8) if small else ResNet50()


def _residual(channels: int, embedding: int = 1280) -> Callable[[int | None, bool], nn.Module]:
    return lambda layers, small: Residual(32 if small else channels, embedding and (16 if small else embedding))


# --- what each is called with, on its own device ---


def _tokens(model: nn.Module, shape: Shape) -> Tensor:
    return torch.randint(model.config.vocab_size, shape, device=model.device)


def _labelled(model: nn.Module, shape: Shape) -> Arguments:
    tokens = _tokens(model, shape)
    # No cache of keys and values, which training has no use for.
    cache = {} if model.config.model_type == "bert" else dict(use_cache=False)
    return dict(input_ids=tokens, labels=tokens, **cache)


def _prompt(model: nn.Module, shape: Shape) -> Arguments:
    return dict(input_ids=_tokens(model, shape), use_cache=False, logits_to_keep=1)


def _next_token(model: nn.Module, shape: Shape) -> Arguments:
    """One token behind a filled cache. Each step writes the same place of it again (``_rewind``)."""
    from transformers import StaticCache

    batch, context = shape
    cache = StaticCache(config=model.config, max_cache_len=context + 8)
    model(input_ids=_tokens(model, shape), past_key_values=cache, logits_to_keep=1)
    where = torch.full((batch, 1), context, device=model.device)
    return dict(input_ids=_tokens(model, (batch, 1)), past_key_values=cache, position_ids=where)


def _rewind(arguments: Arguments) -> None:
    context = int(arguments["position_ids"][0, 0])
    for layer in arguments["past_key_values"].layers:
        layer.cumulative_length.fill_(context)
        if hasattr(layer, "cumulative_length_int"):  # of a sliding window's
            layer.cumulative_length_int = context


def _pictures(model: nn.Module, shape: Shape) -> Arguments:
    labels = torch.arange(shape[0], device=model.device) % model.config.num_labels
    return dict(pixel_values=torch.randn(shape, device=model.device), labels=labels)


def _images(model: nn.Module, shape: Shape) -> Arguments:
    parameter = next(model.parameters())
    return dict(x=torch.randn(shape, device=parameter.device).to(parameter.dtype))


def _images_at_a_time(model: nn.Module, shape: Shape) -> Arguments:
    images = _images(model, shape)["x"].requires_grad_()
    return dict(x=images, t=torch.randn_like(images[:, 0, 0, :1]).expand(-1, model.time.in_features).contiguous().detach())


# --- what is trained ---


def _own(output: Any) -> Tensor:
    return output.loss


def _classes(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), torch.arange(len(logits), device=logits.device) % logits.shape[1])


def _square(y: Tensor) -> Tensor:
    return y.float().square().mean()


# --- the table ---

_LANGUAGE = "AutoModelForCausalLM"
_SMALL = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
_SMALL_DECODER = dict(_SMALL, num_key_value_heads=2, head_dim=16)
_NO_WORDS = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
_ROPE = "rope_parameters"

_LLAMA: dict[str, Any] = dict(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16)
_LLAMA |= dict(num_attention_heads=32, num_key_value_heads=8, head_dim=64, max_position_embeddings=131072)
_LLAMA |= dict(rms_norm_eps=1e-5, tie_word_embeddings=True, **_NO_WORDS)
_LLAMA[_ROPE] = dict(rope_type="default", rope_theta=500000.0)

_QWEN3: dict[str, Any] = dict(vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28)
_QWEN3 |= dict(num_attention_heads=16, num_key_value_heads=8, head_dim=128, max_position_embeddings=40960)
_QWEN3 |= dict(rms_norm_eps=1e-6, tie_word_embeddings=True, **_NO_WORDS)
_QWEN3[_ROPE] = dict(rope_type="default", rope_theta=1000000.0)

# Of six layers one attends to all tokens, the others to 512.
_GEMMA3: dict[str, Any] = dict(vocab_size=262144, hidden_size=1152, intermediate_size=6912, num_hidden_layers=26)
_GEMMA3 |= dict(num_attention_heads=4, num_key_value_heads=1, head_dim=256, max_position_embeddings=32768)
_GEMMA3 |= dict(sliding_window=512, query_pre_attn_scalar=256, tie_word_embeddings=True, **_NO_WORDS)
_SMALL_GEMMA3 = dict(_SMALL_DECODER, sliding_window=8, query_pre_attn_scalar=16)

# Without dropout, whose draws would hide what is compared.
_GPT2: dict[str, Any] = dict(
    n_embd=768, n_layer=12, n_head=12, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **_NO_WORDS
)
_SMALL_GPT2: dict[str, Any] = dict(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64)
_BERT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
_VIT = dict(num_labels=1000)
_SMALL_VIT = dict(_SMALL, image_size=32)

_llama = _transformers(_LANGUAGE, "LlamaConfig", _LLAMA, _SMALL_DECODER)
_qwen3 = _transformers(_LANGUAGE, "Qwen3Config", _QWEN3, _SMALL_DECODER)
_gemma3 = _transformers(_LANGUAGE, "Gemma3TextConfig", _GEMMA3, _SMALL_GEMMA3)
_gpt2 = _transformers(_LANGUAGE, "GPT2Config", _GPT2, _SMALL_GPT2, "n_layer")
_bert = _transformers("AutoModelForMaskedLM", "BertConfig", _BERT, _SMALL)
_vit = _transformers("AutoModelForImageClassification", "ViTConfig", _VIT, _SMALL_VIT)

_LAYERS = ("layers", "trinorm+layers")

_words = dict(inputs=_labelled, tiny=(2, 12), loss=_own)
_photos = dict(shape=(64, 3, 224, 224), tiny=(2, 3, 32, 32), autocast=True)
_decoder = dict(layers=26, tiny=(2, 12))
_block = dict(inputs=_images_at_a_time, tiny=(2, 32, 8, 8), loss=_square)

# In this order; the most telling ones first, since a run's time may end.
CASES: dict[str, Case] = {
    "llama": Case("Llama-3.2-1B", _llama, shape=(4, 4096), compared=(1, 512), layers=16, few=4, **_words),
    "qwen3": Case("Qwen3-0.6B", _qwen3, shape=(4, 4096), compared=(1, 512), layers=28, **_words),
    "resnet": Case("ResNet-50", _resnet, _images, loss=_classes, last=True, **_photos),
    "convnext": Case("ConvNeXt-T", _convnext, _images, loss=_classes, last=True, **_photos),
    "unet": Case("UNet block", _residual(320), shape=(8, 320, 64, 64), **_block),
    "unet-last": Case("UNet block", _residual(320), shape=(8, 320, 64, 64), last=True, **_block),
    "vit": Case("ViT-B", _vit, _pictures, loss=_own, layers=12, **_photos),
    "bert": Case("BERT-base", _bert, shape=(16, 512), layers=12, **_words),
    "gpt2": Case("GPT-2", _gpt2, shape=(8, 1024), layers=12, **_words),
    "prefill": Case("Gemma3-1B", _gemma3, _prompt, (4, 4096), what="prefill", **_decoder),
    # A layer that indexes the cache is compiled for each index.
    "decode": Case(
        "Gemma3-1B", _gemma3, _next_token, (16, 2048), what="decode", before=_rewind, few=6, without=_LAYERS, **_decoder
    ),
}

# Measured when they are asked for: other sizes and orders of memory of what is above, and the VAE decoder's block, forward.
FURTHER: dict[str, Case] = {
    "unet-640": Case("SDXL's UNet block", _residual(640), shape=(4, 640, 64, 64), **_block),
    "unet-640-last": Case("SDXL's UNet block", _residual(640), shape=(4, 640, 64, 64), last=True, **_block),
    "vae-last": Case("VAE block", _residual(256, 0), _images, (1, 256, 512, 512), (1, 32, 8, 8), what="forward", last=True),
    "resnet-256": Case("ResNet-50", _resnet, _images, loss=_classes, last=True, **{**_photos, "shape": (256, 3, 224, 224)}),
    "convnext-first": Case("ConvNeXt-T", _convnext, _images, loss=_classes, **_photos),
}
