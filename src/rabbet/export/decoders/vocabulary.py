"""The words of a tokenizer as GGUF files hold them: byte-level BPE, as of GPT-2 or Llama 3."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rabbet.errors import ModelError

NORMAL, CONTROL, OWN, UNUSED = 1, 3, 4, 5  # kinds of tokens in GGUF
LLAMA3 = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}|"
"""How the expression begins by which Llama 3 cuts a text."""


@dataclass(frozen=True)
class Vocabulary:
    """Tokens in order, their kinds, the merges, and by which rule texts are cut.

    rule: llama.cpp's name for that; empty without a tokenizer. begins: whether a token stands in
    front of every text.
    """

    tokens: Sequence[str]
    kinds: Sequence[int]
    merges: Sequence[str] = ()
    rule: str = ""
    notes: tuple[str, ...] = ()
    begins: bool = False

    @classmethod
    def of(cls, tokenizer: Any, files: Sequence[Path], count: int) -> "Vocabulary":
        """That of a tokenizer, or of the file `tokenizer.json`; of neither, without words.

        count: rows of the table; those without a word are unused. Raises ModelError for a tokenizer
        that is not byte-level BPE, or has more words than rows.
        """
        if tokenizer is not None:
            backend = getattr(tokenizer, "backend_tokenizer", None)
            if backend is None:
                raise ModelError(
                    f"{type(tokenizer).__name__} has no tokenizer.json; load it as a fast tokenizer"
                )
            return cls.read(json.loads(backend.to_str()), count)
        file = next((f for f in files if f.name == "tokenizer.json"), None)
        if file is not None:
            return cls.read(json.loads(file.read_text(encoding="utf-8")), count)
        note = (
            "no tokenizer was found beside the network: the file takes and gives numbers of words"
        )
        words = [f"[{k}]" for k in range(count)]
        return cls(words, [UNUSED] * count, notes=(note,))

    @classmethod
    def read(cls, said: dict[str, Any], count: int) -> "Vocabulary":
        """That of the content of a `tokenizer.json`."""
        model, rule = said["model"], _rule(said)
        tokens: list[str | None] = [None] * count
        kinds = [UNUSED] * count
        added = [(t["content"], t["id"], CONTROL if t["special"] else OWN) for t in _added(said)]
        for word, k, kind in [*((w, k, NORMAL) for w, k in model["vocab"].items()), *added]:
            if k >= count:
                raise ModelError(
                    f"the tokenizer has a word {k} ({word!r}), the network {count} rows: it is "
                    "that of another network"
                )
            tokens[k], kinds[k] = word, kind
        merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        whole = [f"[PAD{k}]" if word is None else word for k, word in enumerate(tokens)]
        return cls(whole, kinds, merges, rule, begins=_begins(said))

    def write(self, writer: Any, config: Any) -> None:
        """Write it with a `GGUFWriter`; config: of transformers, which knows special tokens."""
        writer.add_tokenizer_model("gpt2" if self.rule else "none")
        writer.add_token_list(list(self.tokens))
        writer.add_token_types(list(self.kinds))
        if self.rule:
            writer.add_tokenizer_pre(self.rule)
            writer.add_token_merges(list(self.merges))
            writer.add_add_bos_token(self.begins)
        for name in ("bos", "eos", "pad"):
            k = getattr(config, f"{name}_token_id", None)
            k = k[0] if isinstance(k, list) else k
            if k is not None and 0 <= k < len(self.tokens):
                getattr(writer, f"add_{name}_token_id")(k)


def _added(said: dict[str, Any]) -> list[dict[str, Any]]:
    return list(said.get("added_tokens") or [])


def _begins(said: dict[str, Any]) -> bool:
    """Whether the last of what is done to words puts a token in front of them."""
    done = said.get("post_processor") or {}
    firsts = [step.get("single") or [{}] for step in done.get("processors", [done])]
    return any("SpecialToken" in single[0] for single in firsts)


def _rule(said: dict[str, Any]) -> str:
    """Llama.cpp's name for how a text is cut into words; ModelError if it has none."""
    cutting = said.get("pre_tokenizer") or {}
    steps = cutting.get("pretokenizers", [cutting])
    kinds = [step.get("type") for step in steps]
    if said["model"].get("type") != "BPE" or "ByteLevel" not in kinds:
        raise ModelError(
            f"a GGUF file takes a tokenizer of byte-level BPE here; this one is "
            f"{said['model'].get('type')} with {', '.join(map(str, kinds))}"
        )
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    expression = str(steps[0].get("pattern", {}).get("Regex", ""))
    if kinds == ["Split", "ByteLevel"] and expression.startswith(LLAMA3):
        return "llama-bpe"
    raise ModelError(
        f"llama.cpp has no name known here for how this tokenizer cuts texts ({kinds}); known are "
        "those of GPT-2, SmolLM and Llama 3"
    )
