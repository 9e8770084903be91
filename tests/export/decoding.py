"""Small decoders of three families, and how tests compress them by hand."""

from types import SimpleNamespace

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

import rabbet
from rabbet.model.build import build

WORDS = 96
COMMON = {"vocab_size": WORDS, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WIDE = 0.3  # of random weights; else a tied table repeats the last word for ever


def llama(width=64, tied=True):
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
            tie_word_embeddings=tied, initializer_range=WIDE, **COMMON,
        )
    )  # fmt: skip


def gpt2(width=64, positions=64, inner=None):
    return GPT2LMHeadModel(
        GPT2Config(
            n_embd=width, n_layer=2, n_head=4, n_positions=positions, n_inner=inner,
            initializer_range=WIDE, **COMMON,
        )
    )  # fmt: skip


def opt():
    return OPTForCausalLM(
        OPTConfig(
            hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, word_embed_proj_dim=32, init_std=WIDE, **COMMON,
        )
    )  # fmt: skip


def opened(make):
    """A network of fixed random weights, its data and its survey."""
    torch.manual_seed(0)
    model = make().eval()
    model.config.use_cache = False
    data = [torch.randint(0, WORDS, (4, 12))]
    return SimpleNamespace(model=model, data=data, survey=rabbet.survey(model, data))


def compressed(network, grid, adapter=""):
    """Every layer on one grid, rounded to nearest; an adapter beside those of as many outputs."""
    width = network.model.config.hidden_size
    beside = {
        s.name for s in network.survey if s.shape[0] == width and s.multiplies and not s.heads
    }
    lines = [f"{s.name} dense@{grid}{adapter * (s.name in beside)}" for s in network.survey]
    return build(network.model, rabbet.Plan.parse("\n".join(lines)), network.survey).eval()


def prompts(batch):
    """Texts of random words; the first of several is padded on the left."""
    ids = torch.randint(3, WORDS, (batch, 9), generator=torch.Generator().manual_seed(batch))
    mask = torch.ones_like(ids)
    if batch > 1:
        mask[0, :4] = 0
    return ids, mask
