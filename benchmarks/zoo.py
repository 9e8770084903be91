"""Architectures that people use, with random weights at small sizes; see architectures.py.

An entry is a function that makes a network in eval mode and batches for it. What a package brings
is imported only then.
"""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Made = tuple[nn.Module, list[Any]]
Make = Callable[[], Made]

# Networks of our own hand


class Denoiser(nn.Module):
    """Spectra in, masked spectra out, by a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(65, 96), nn.Linear(96, 65)
        self.rnn = nn.GRU(96, 96, num_layers=2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, frames, 65] -> the same."""
        return x * torch.sigmoid(self.last(self.rnn(torch.relu(self.first(x)))[0]))


class CRNN(nn.Module):
    """Convs over an image of text, a bidirectional LSTM over its columns."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d((4, 2)),
        )  # fmt: skip
        self.rnn = nn.LSTM(32 * 4, 64, bidirectional=True)
        self.last = nn.Linear(128, 37)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 1, 32, width] -> [width / 4, batch, signs]."""
        columns = self.convs(x).flatten(1, 2).permute(2, 0, 1)
        return self.last(self.rnn(columns)[0])


class Tagger(nn.Module):
    """Words in, a tag for each out."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.words = nn.Embedding(200, 48)
        self.rnn = kind(48, 64, batch_first=True, bidirectional=True)  # type: ignore[arg-type]
        self.last = nn.Linear(128, 12)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, words] -> [batch, words, tags]."""
        return self.last(self.rnn(self.words(x))[0])


class Cells(nn.Module):
    """An LSTM cell that is run step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.last = nn.LSTMCell(20, 64), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, steps, 20] -> [batch, 5]."""
        state = (x.new_zeros(x.shape[0], 64), x.new_zeros(x.shape[0], 64))
        for k in range(6):
            state = self.cell(x[:, k], state)
        return self.last(state[0])


class DLRM(nn.Module):
    """Bags of categories and dense features, and their products."""

    def __init__(self) -> None:
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(n, 16, mode="sum") for n in (1000, 500, 100))
        self.bottom = nn.Sequential(nn.Linear(13, 64), nn.ReLU(), nn.Linear(64, 16), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(16 + 6, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, dense: Tensor, places: Tensor) -> Tensor:
        """[batch, 13], [batch, 3, few] -> [batch, 1]."""
        rows = [self.bottom(dense), *(bag(places[:, k]) for k, bag in enumerate(self.bags))]
        stacked = torch.stack(rows, 1)
        products = stacked @ stacked.mT
        pairs = [products[:, i, j] for i in range(4) for j in range(i)]
        return self.top(torch.cat([rows[0], torch.stack(pairs, 1)], 1))


class Spectral(nn.Module):
    """A Fourier layer: a bare complex weight kept as two real ones."""

    def __init__(self, width: int, modes: int) -> None:
        super().__init__()
        self.modes = modes
        self.real = nn.Parameter(torch.randn(width, width, modes) / width)
        self.imaginary = nn.Parameter(torch.randn(width, width, modes) / width)
        self.beside = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, width, places] -> the same."""
        count = 64
        waves = torch.arange(self.modes)[:, None] * torch.arange(count) * (2 * torch.pi / count)
        cos, sin = waves.cos().to(x), waves.sin().to(x)
        real, imaginary = x @ cos.mT, -(x @ sin.mT)

        def mixed(a: Tensor, w: Tensor) -> Tensor:
            return torch.einsum("bim,iom->bom", a, w)

        up = mixed(real, self.real) - mixed(imaginary, self.imaginary)
        down = mixed(real, self.imaginary) + mixed(imaginary, self.real)
        return F.gelu((up @ cos - down @ sin) * (2 / count) + self.beside(x))


class FNO(nn.Module):
    """A Fourier neural operator over one axis."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv1d(2, 24, 1), nn.Conv1d(24, 1, 1)
        self.layers = nn.Sequential(*(Spectral(24, 12) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 2, 64] -> [batch, 1, 64]."""
        return self.last(self.layers(self.first(x)))


class TasNet(nn.Module):
    """Conv-TasNet in small: an encoder, a separator of dilated convs, a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Conv1d(1, 128, 16, 8, bias=False)
        self.decoder = nn.ConvTranspose1d(128, 1, 16, 8, bias=False)
        self.norm, self.narrow = nn.GroupNorm(1, 128), nn.Conv1d(128, 64, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv1d(64, 128, 1), nn.PReLU(), nn.GroupNorm(1, 128),
                nn.Conv1d(128, 128, 3, padding=d, dilation=d, groups=128), nn.PReLU(),
                nn.GroupNorm(1, 128), nn.Conv1d(128, 64, 1),
            )
            for d in (1, 2, 4, 8)
        )  # fmt: skip
        self.mask = nn.Conv1d(64, 256, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 1, samples] -> [batch, 2, samples]."""
        code = torch.relu(self.encoder(x))
        y = self.narrow(self.norm(code))
        for block in self.blocks:
            y = y + block(y)
        masks = torch.sigmoid(self.mask(y)).chunk(2, 1)
        return torch.cat([self.decoder(code * mask) for mask in masks], 1)


def double(space: int, cin: int, cout: int) -> nn.Sequential:
    """Two convs with their norms."""
    conv, norm = getattr(nn, f"Conv{space}d"), getattr(nn, f"BatchNorm{space}d")
    return nn.Sequential(
        conv(cin, cout, 3, padding=1, bias=False), norm(cout), nn.ReLU(),
        conv(cout, cout, 3, padding=1, bias=False), norm(cout), nn.ReLU(),
    )  # fmt: skip


class UNet(nn.Module):
    """A U-Net of three levels, over images or volumes."""

    def __init__(self, space: int) -> None:
        super().__init__()
        up = getattr(nn, f"ConvTranspose{space}d")
        self.down = nn.ModuleList([double(space, 1, 8), double(space, 8, 16)])
        self.pool = getattr(nn, f"MaxPool{space}d")(2)
        self.middle = double(space, 16, 32)
        self.up = nn.ModuleList([up(32, 16, 2, 2), up(16, 8, 2, 2)])
        self.join = nn.ModuleList([double(space, 32, 16), double(space, 16, 8)])
        self.last = getattr(nn, f"Conv{space}d")(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 1, *places] -> [batch, 3, *places]."""
        kept = []
        for block in self.down:
            x = block(x)
            kept.append(x)
            x = self.pool(x)
        x = self.middle(x)
        for up, join in zip(self.up, self.join, strict=True):
            x = join(torch.cat([kept.pop(), up(x)], 1))
        return self.last(x)


def dcgan(spectral: bool = False) -> nn.Module:
    """A generator of 32 x 32 images, or a discriminator with spectral norm."""
    if spectral:
        norm = nn.utils.parametrizations.spectral_norm
        return nn.Sequential(
            norm(nn.Conv2d(3, 16, 4, 2, 1)), nn.LeakyReLU(0.2),
            norm(nn.Conv2d(16, 32, 4, 2, 1)), nn.LeakyReLU(0.2),
            norm(nn.Conv2d(32, 64, 4, 2, 1)), nn.LeakyReLU(0.2), norm(nn.Conv2d(64, 1, 4)),
        )  # fmt: skip
    return nn.Sequential(
        nn.ConvTranspose2d(32, 64, 4, 1, 0, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.ConvTranspose2d(64, 32, 4, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.ConvTranspose2d(32, 16, 4, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.ConvTranspose2d(16, 3, 4, 2, 1, bias=False), nn.Tanh(),
    )  # fmt: skip


def tcn() -> nn.Module:
    """Dilated causal convs with weight norm."""
    norm = nn.utils.parametrizations.weight_norm
    layers: list[nn.Module] = []
    for k, (cin, cout) in enumerate([(8, 32), (32, 32), (32, 32)]):
        layers += [nn.ConstantPad1d((2 * 2**k, 0), 0.0)]
        layers += [norm(nn.Conv1d(cin, cout, 3, dilation=2**k)), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, 4))


class Bags(nn.Module):
    """Text as a bag of words."""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.last = nn.EmbeddingBag(2000, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, words] -> [batch, 4]."""
        return self.last(self.bag(x))


class Seq2Seq(nn.Module):
    """torch's own Transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.last = nn.Embedding(100, 32), nn.Linear(32, 100)
        self.places = nn.Parameter(0.1 * torch.randn(1, 12, 32))
        self.body = nn.Transformer(32, 4, 2, 2, 64, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 12] -> [batch, 12, 100]."""
        mask = torch.ones(12, 12, dtype=torch.bool, device=x.device).triu(1)
        y = self.words(x) + self.places
        return self.last(self.body(y, y, tgt_mask=mask))


def noise(model: nn.Module, *shape: int, count: int = 2) -> Made:
    """A network and batches of normal numbers."""
    return model.eval(), [torch.randn(shape) for _ in range(count)]


def words(model: nn.Module, *shape: int, most: int = 100) -> Made:
    """A network and batches of indices."""
    return model.eval(), [torch.randint(1, most, shape) for _ in range(2)]


def ran(model: nn.Module, *shape: int) -> nn.Module:
    """A network after a few passes in train mode, so that its statistics are some."""
    with torch.no_grad():
        for _ in range(4):
            model.train()(torch.randn(shape))
    return model


OWN: dict[str, Make] = {
    "GRU denoiser": lambda: noise(Denoiser(), 8, 20, 65),
    "CRNN": lambda: noise(ran(CRNN(), 4, 1, 32, 64), 8, 1, 32, 64),
    "LSTM tagger": lambda: words(Tagger(nn.LSTM), 16, 12),
    "GRU tagger": lambda: words(Tagger(nn.GRU), 16, 12),
    "LSTM cells": lambda: noise(Cells(), 16, 6, 20),
    "DLRM": lambda: (
        DLRM().eval(),
        [(torch.randn(16, 13), torch.randint(100, (16, 3, 4))) for _ in range(2)],
    ),
    "FNO": lambda: noise(FNO(), 8, 2, 64),
    "Conv-TasNet": lambda: noise(TasNet(), 4, 1, 800),
    "U-Net 2-D": lambda: noise(ran(UNet(2), 4, 1, 32, 32), 4, 1, 32, 32),
    "U-Net 3-D": lambda: noise(ran(UNet(3), 2, 1, 16, 16, 16), 2, 1, 16, 16, 16),
    "DCGAN generator": lambda: noise(ran(dcgan(), 8, 32, 1, 1), 8, 32, 1, 1),
    "DCGAN discriminator": lambda: noise(ran(dcgan(True), 8, 3, 32, 32), 8, 3, 32, 32),
    "TCN": lambda: noise(tcn(), 16, 8, 40),
    "EmbeddingBag": lambda: words(Bags(), 16, 10, most=2000),
    "torch Transformer": lambda: words(Seq2Seq(), 8, 12),
}

# timm, torchvision, segmentation_models_pytorch, ultralytics, diffusers


def operators() -> None:
    """Declare what torchvision's own library holds, where its build does not fit torch's."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        operators.library = library  # type: ignore[attr-defined]  # as long as this program


def timm(name: str, size: int = 64, **settings: Any) -> Make:
    """A network of timm for square images."""

    def make() -> Made:
        operators()
        package = importlib.import_module("timm")
        model = package.create_model(name, pretrained=False, num_classes=10, **settings)
        return noise(model, 4, 3, size, size)

    return make


SMALL_IMAGES = (
    "resnet10t", "resnet18", "resnext26ts", "regnetx_002", "regnety_002", "mobilenetv2_035",
    "mobilenetv3_small_050", "mobilenetv4_conv_small_050", "tf_mobilenetv3_small_minimal_100",
    "efficientnet_b0", "tf_efficientnet_lite0", "tinynet_e", "ghostnet_050", "ghostnetv2_100",
    "mnasnet_small", "spnasnet_100", "fbnetc_100", "hardcorenas_a", "lcnet_035", "semnasnet_050",
    "convnext_atto", "convnextv2_atto", "nf_regnet_b0", "repvgg_a0", "hrnet_w18_small",
    "edgenext_xx_small", "mobileone_s0", "vovnet39a", "dla46_c", "selecsls42",
    "res2net50_26w_4s", "skresnet18", "ecaresnet26t", "seresnet18", "rexnet_100", "densenet121",
    "dpn48b", "cspresnet50", "darknet17", "inception_next_atto", "poolformer_s12", "starnet_s1",
    "repvit_m0_9", "fastvit_t8", "gernet_s", "botnet26t_256", "test_efficientnet", "test_nfnet",
    "test_convnext", "test_byobnet", "test_mambaout", "test_resnet",
)  # fmt: skip
TIMM = {
    **dict.fromkeys(SMALL_IMAGES, 64),
    "inception_v3": 96, "xception41": 64, "vit_tiny_patch16_224": 224,
    "deit_tiny_patch16_224": 224, "swin_tiny_patch4_window7_224": 224,
    "beit_base_patch16_224": 224, "mixer_s32_224": 224, "gmlp_ti16_224": 224,
    "resmlp_12_224": 224, "levit_128s": 224, "mobilevit_xxs": 64, "mobilevitv2_050": 64,
    "maxvit_rmlp_pico_rw_256": 256, "eva02_tiny_patch14_224": 224, "cait_xxs24_224": 224,
    "pit_ti_224": 224, "xcit_nano_12_p16_224": 224, "crossvit_tiny_240": 240,
    "coat_lite_tiny": 64, "twins_svt_small": 224, "visformer_tiny": 224,
    "efficientformer_l1": 224, "convmixer_768_32": 64, "tiny_vit_5m_224": 224, "test_vit": 160,
}  # fmt: skip


def torchvision(path: str, *shape: int, **settings: Any) -> Make:
    """A network of torchvision."""

    def make() -> Made:
        operators()
        folder, _, name = path.rpartition(".")
        module = importlib.import_module(f"torchvision.models{'.' if folder else ''}{folder}")
        return noise(getattr(module, name)(weights=None, **settings), *shape)

    return make


TORCHVISION: dict[str, Make] = {
    "squeezenet1_1": torchvision("squeezenet1_1", 4, 3, 64, 64, num_classes=10),
    "shufflenet_v2_x0_5": torchvision("shufflenet_v2_x0_5", 4, 3, 64, 64, num_classes=10),
    "mnasnet0_5": torchvision("mnasnet0_5", 4, 3, 64, 64, num_classes=10),
    "googlenet": torchvision(
        "googlenet", 4, 3, 64, 64, num_classes=10, aux_logits=False, init_weights=False
    ),
    "vit_b_32": torchvision("vit_b_32", 2, 3, 64, 64, num_classes=10, image_size=64),
    "swin_t": torchvision("swin_t", 2, 3, 64, 64, num_classes=10),
    "lraspp": torchvision(
        "segmentation.lraspp_mobilenet_v3_large", 2, 3, 64, 64, num_classes=5, weights_backbone=None
    ),
    "deeplabv3": torchvision(
        "segmentation.deeplabv3_mobilenet_v3_large", 2, 3, 64, 64,
        num_classes=5, weights_backbone=None,
    ),
    "r3d_18": torchvision("video.r3d_18", 2, 3, 4, 32, 32, num_classes=10),
    "mvit_v2_s": torchvision("video.mvit_v2_s", 1, 3, 16, 224, 224, num_classes=10),
}  # fmt: skip


def others() -> dict[str, Make]:
    """What single packages bring."""

    def smp(name: str) -> Make:
        def make() -> Made:
            operators()
            package = importlib.import_module("segmentation_models_pytorch")
            model = getattr(package, name)("timm-mobilenetv3_small_100", encoder_weights=None)
            return noise(model, 2, 3, 64, 64)

        return make

    def diffusers(name: str, *shape: int, **settings: Any) -> Make:
        def make() -> Made:
            package = importlib.import_module("diffusers")
            model = getattr(package, name)(**settings).eval()
            if name == "UNet2DModel":
                return model, [(torch.randn(shape), torch.tensor([5, 9])) for _ in range(2)]
            return noise(model, *shape)

        return make

    def yolo(name: str) -> Make:
        def make() -> Made:
            operators()
            tasks = importlib.import_module("ultralytics.nn.tasks")
            return noise(tasks.DetectionModel(f"{name}.yaml", verbose=False), 2, 3, 64, 64)

        return make

    blocks = {
        "block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 8, "attention_head_dim": 8, "layers_per_block": 1,
    }  # fmt: skip
    ends = {
        "block_out_channels": (16, 32), "norm_num_groups": 8, "layers_per_block": 1,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }  # fmt: skip
    return {
        **{f"smp {name}": smp(name) for name in ("Unet", "FPN", "Linknet", "PSPNet")},
        "diffusers U-Net": diffusers("UNet2DModel", 2, 3, 16, 16, sample_size=16, **blocks),
        "diffusers VAE": diffusers("AutoencoderKL", 2, 3, 32, 32, **ends),
        **{name: yolo(name) for name in ("yolov5n", "yolov8n", "yolo11n")},
    }


# transformers

SMALL = {
    "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 64, "max_position_embeddings": 64, "d_model": 32, "encoder_layers": 2,
    "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "d_ff": 64, "d_kv": 8, "num_layers": 2,
    "num_heads": 4, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 64,
    "embedding_size": 32, "num_key_value_heads": 2, "head_dim": 8, "ffn_dim": 64, "dim": 32,
    "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embedding": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
"""The names by which configurations call their sizes."""

TEXT = (
    "Bert", "Roberta", "Albert", "Electra", "Deberta", "DebertaV2", "MPNet", "ConvBert", "XLNet",
    "Longformer", "BigBird", "Funnel", "SqueezeBert", "RoFormer", "DistilBert", "MobileBert",
    "LayoutLM", "Nystromformer", "FNet", "Canine", "IBert", "ModernBert",
)  # fmt: skip
CAUSAL = (
    "GPT2", "GPTNeo", "GPTNeoX", "GPTJ", "OPT", "Bloom", "Llama", "Mistral", "Mixtral", "Qwen2",
    "Qwen3", "Gemma", "Gemma2", "Phi", "Falcon", "Mamba", "Mamba2", "StableLm", "Starcoder2", "Mpt",
    "CodeGen", "Rwkv", "Olmo", "Granite", "Cohere",
)  # fmt: skip
CONFIGS: Mapping[str, dict[str, Any]] = {
    "GPTNeo": {"attention_types": [[["global", "local"], 1]], "intermediate_size": 64},
    "GPTJ": {"rotary_dim": 4}, "CodeGen": {"rotary_dim": 4}, "Mixtral": {"num_local_experts": 4},
    # the header of a file is more than 15 % of anything smaller
    "ConvBert": {"hidden_size": 64, "intermediate_size": 128, "embedding_size": 64},
    "SqueezeBert": {"hidden_size": 64, "intermediate_size": 128, "embedding_size": 64},
    "Longformer": {"attention_window": 8}, "XLNet": {"d_inner": 64},
    "BigBird": {"attention_type": "original_full"}, "Mamba2": {"num_heads": 8, "head_dim": 8,
    "n_groups": 1, "state_size": 16}, "Funnel": {"block_sizes": [1, 1], "d_head": 8, "d_inner": 64},
    "Falcon": {"new_decoder_architecture": False, "multi_query": True},
    "MobileBert": {"embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32},
    "Rwkv": {"attention_hidden_size": 32}, "FNet": {"tpu_short_seq_length": 16},
    "Gemma": {"head_dim": 8}, "Gemma2": {"head_dim": 8}, "Qwen3": {"head_dim": 8},
    "Canine": {"num_hash_buckets": 64, "local_transformer_stride": 8, "downsampling_rate": 4},
    "Mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2},
    "ModernBert": {"global_attn_every_n_layers": 2, "reference_compile": False},
}  # fmt: skip


def configured(name: str, **more: Any) -> Any:
    """A small configuration of transformers."""
    package = importlib.import_module("transformers")
    kind = getattr(package, f"{name}Config")
    usual = kind()
    known = {key: value for key, value in SMALL.items() if hasattr(usual, key)}
    own = {**CONFIGS.get(name, {}), **more}
    settings = {**known, **own}
    for key, value in known.items():  # what follows from others may not be set
        try:
            setattr(kind(), key, value)
        except (AttributeError, NotImplementedError):
            settings.pop(key) if key not in own else None
    return kind(**settings)


def text(name: str, head: str) -> Make:
    """A network of transformers over tokens."""

    def make() -> Made:
        package = importlib.import_module("transformers")
        config = configured(name)
        if head == "ForCausalLM":
            config.use_cache = False
        model = getattr(package, {"GPT2": "GPT2LMHeadModel"}.get(name, f"{name}{head}"))(config)
        batches = [{"input_ids": torch.randint(3, 99, (4, 16))} for _ in range(2)]
        return model.eval(), batches

    return make


def pairs(name: str, head: str = "ForConditionalGeneration") -> Make:
    """An encoder and a decoder over tokens."""

    def make() -> Made:
        package = importlib.import_module("transformers")
        model = getattr(package, f"{name}{head}")(configured(name, decoder_start_token_id=1))

        def ids() -> Tensor:
            return torch.randint(3, 99, (4, 12))

        batches = [{"input_ids": ids(), "decoder_input_ids": ids()} for _ in range(2)]
        return model.eval(), batches

    return make


def pictures(name: str, size: int = 32, head: str = "ForImageClassification", **more: Any) -> Make:
    """A network of transformers over images."""

    def make() -> Made:
        package = importlib.import_module("transformers")
        config = configured(name, **more)
        batches = [{"pixel_values": torch.randn(2, 3, size, size)} for _ in range(2)]
        return getattr(package, f"{name}{head}")(config).eval(), batches

    return make


def sounds(name: str, **more: Any) -> Make:
    """A network of transformers over sound."""

    def make() -> Made:
        package = importlib.import_module("transformers")
        if name == "Whisper":
            config = configured(name, num_mel_bins=16, max_source_positions=32, **more)
            model = package.WhisperForConditionalGeneration(config)
            batches = [
                {
                    "input_features": torch.randn(2, 16, 64),
                    "decoder_input_ids": torch.randint(3, 99, (2, 8)),
                }
                for _ in range(2)
            ]
            return model.eval(), batches
        layers = {
            "conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3),
            "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
        }  # fmt: skip
        config = configured(name, **layers, **more)
        model = getattr(package, f"{name}ForCTC")(config)
        return model.eval(), [{"input_values": torch.randn(2, 800)} for _ in range(2)]

    return make


def mapped(make: Make) -> Make:
    """The same with batches that are passed by name, and the scores alone as the answer."""

    def made() -> Made:
        if importlib.util.find_spec("torchvision"):
            operators()  # transformers imports it where it is
        model, batches = make()
        return Scores(model), batches

    return made


class Scores(nn.Module):
    """A network of transformers of which only the first output counts."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **given: Tensor) -> Tensor:
        """The scores, or the first tensor of any other answer."""
        answer = self.inner(**given, return_dict=True)
        for name in ("logits", "last_hidden_state"):
            if getattr(answer, name, None) is not None:
                return answer[name]
        return answer[0]


TRANSFORMERS: dict[str, Make] = {
    **{name: text(name, "ForSequenceClassification") for name in TEXT if name != "FNet"},
    "FNet": text("FNet", "Model"),
    **{name: text(name, "ForCausalLM") for name in CAUSAL},
    **{name: pairs(name) for name in ("T5", "Bart", "Pegasus", "BlenderbotSmall", "PLBart")},
    "Marian": pairs("Marian", "MTModel"),
    "ViT": pictures("ViT", image_size=32, patch_size=8),
    "Beit": pictures("Beit", image_size=32, patch_size=8),
    "Swin": pictures(
        "Swin", image_size=32, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 4],
        window_size=4,
    ),
    "Segformer": pictures(
        "Segformer", hidden_sizes=[8, 16, 16, 16], depths=[1] * 4, num_attention_heads=[1, 2, 2, 2],
    ),
    "ConvNext": pictures("ConvNext", hidden_sizes=[8, 16, 16, 16], depths=[1] * 4),
    "MobileViT": pictures(
        "MobileViT", 64, image_size=64, hidden_sizes=[32, 48, 64],
        neck_hidden_sizes=[8, 8, 16, 16, 16, 16, 32],
    ),
    "Dinov2": pictures("Dinov2", image_size=32, patch_size=8),
    "Wav2Vec2": sounds("Wav2Vec2"),
    "Hubert": sounds("Hubert"),
    "WavLM": sounds("WavLM"),
    "Whisper": sounds("Whisper"),
}  # fmt: skip


ZOO: dict[str, Make] = {
    **OWN,
    **{f"timm {name}": timm(name, size) for name, size in TIMM.items()},
    **{f"torchvision {name}": make for name, make in TORCHVISION.items()},
    **others(),
    **{f"transformers {name}": mapped(make) for name, make in TRANSFORMERS.items()},
}
"""Every architecture by name."""
