"""Folders as they really lie there: of earlier runs, under other names, broken, of odd networks."""

import json
import os
from multiprocessing import get_context

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import rabbet
from rabbet import Blockwise, Task, hf
from rabbet.errors import FileError, ModelError

WORDS = 48
QUICK = Blockwise(
    grids=("3g16", "8c"), adapters=(), epochs=0, passes=0, scale=False, permute=False, scored=2
)


def llama(layers=2):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=WORDS, hidden_size=32, intermediate_size=48,
                         num_hidden_layers=layers, num_attention_heads=4,
                         tie_word_embeddings=False)  # fmt: skip
    return LlamaForCausalLM(config).eval()


def neox():
    torch.manual_seed(0)
    config = GPTNeoXConfig(vocab_size=WORDS, hidden_size=32, intermediate_size=48,
                           num_hidden_layers=2, num_attention_heads=4)  # fmt: skip
    return GPTNeoXForCausalLM(config).eval()


def mixtral():
    config = MixtralConfig(vocab_size=WORDS, hidden_size=32, intermediate_size=48,
                           num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                           num_local_experts=2)  # fmt: skip
    return MixtralForCausalLM(config).eval()


def bart():
    torch.manual_seed(0)
    config = BartConfig(vocab_size=WORDS, d_model=32, encoder_layers=2, decoder_layers=2,
                        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
                        decoder_ffn_dim=48, max_position_embeddings=32)  # fmt: skip
    model = BartForConditionalGeneration(config).eval()
    model.final_logits_bias.copy_(torch.linspace(-2, 2, WORDS)[None])
    return model


def t5():
    config = T5Config(vocab_size=WORDS, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    return T5ForConditionalGeneration(config).eval()


def scores(model, batch):
    return model(**batch, use_cache=False).logits


def batches(both=False):
    g = torch.Generator().manual_seed(0)
    names = ("input_ids", "decoder_input_ids") if both else ("input_ids",)
    return [{n: torch.randint(3, WORDS, (2, 8), generator=g) for n in names} for _ in range(2)]


def task(both=False):
    return Task(batches(both), forward=scores, axes=0)


def compressed(folder, output, both=False, budget="bpw <= 6"):
    return hf.compress_pretrained(folder, budget, task(both), output, method=QUICK)


def answers(model, both=False):
    with torch.no_grad():
        return torch.cat([scores(model, batch) for batch in batches(both)])


@pytest.mark.parametrize(("first", "second"), [("20KB", "1GB"), ("1GB", "20KB"), ("20KB", "40KB")])
def test_an_output_of_an_earlier_run_is_replaced_as_a_whole(first, second, tmp_path):
    torch.manual_seed(0)
    for name, size in (("first", first), ("second", second)):
        llama().save_pretrained(tmp_path / name, max_shard_size=size)
    model = llama()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    model.save_pretrained(tmp_path / "second", max_shard_size=second)
    earlier = compressed(tmp_path / "first", tmp_path / "out")
    stored = compressed(tmp_path / "second", tmp_path / "out")
    assert len(earlier.files) != len(stored.files)
    assert sorted((tmp_path / "out").glob("*.safetensors")) == sorted(stored.files)
    clean = compressed(tmp_path / "second", tmp_path / "clean")
    assert [p.read_bytes() for p in stored.files] == [p.read_bytes() for p in clean.files]
    hf.from_pretrained(tmp_path / "out")


def files_of(folder):
    """All files right in a folder, with their bytes."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def killed(folder, output):
    """Compress, and end the process at the second of the files that are written."""

    def progress(stage, done, _):
        if (stage, done) == ("writing files", 1):
            os._exit(7)

    jobs = rabbet.Jobs(folder=output / ".rabbet-work", progress=progress)
    hf.compress_pretrained(folder, "bpw <= 5", task(), output, method=QUICK, jobs=jobs)


def test_an_earlier_output_survives_a_process_that_is_killed_while_it_writes(tmp_path):
    llama().save_pretrained(tmp_path / "in", max_shard_size="20KB")
    compressed(tmp_path / "in", tmp_path / "out", budget="bpw <= 7")
    earlier, said = files_of(tmp_path / "out"), answers(hf.from_pretrained(tmp_path / "out"))
    process = get_context("spawn").Process(target=killed, args=(tmp_path / "in", tmp_path / "out"))
    process.start()
    process.join()
    assert process.exitcode == 7
    assert files_of(tmp_path / "out") == earlier
    assert torch.equal(answers(hf.from_pretrained(tmp_path / "out")), said)
    compressed(tmp_path / "in", tmp_path / "out", budget="bpw <= 5")
    compressed(tmp_path / "in", tmp_path / "clean", budget="bpw <= 5")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "clean") != earlier
    assert all(path.is_file() for path in (tmp_path / "out").iterdir())


def test_an_earlier_output_survives_where_the_new_one_cannot_lie(tmp_path):
    llama().save_pretrained(tmp_path / "in")
    compressed(tmp_path / "in", tmp_path / "out", budget="bpw <= 7")
    earlier = files_of(tmp_path / "out")
    (tmp_path / "in" / "vocab.txt").write_text("a")
    (tmp_path / "out" / "vocab.txt").mkdir()
    with pytest.raises(FileError, match=r"vocab\.txt: a folder lies there"):
        compressed(tmp_path / "in", tmp_path / "out", budget="bpw <= 5")
    assert files_of(tmp_path / "out") == earlier


def test_files_of_two_networks_in_a_folder_are_not_guessed_between(tmp_path):
    llama().save_pretrained(tmp_path / "in", max_shard_size="20KB")
    stored = compressed(tmp_path / "in", tmp_path / "out")
    spare = tmp_path / "out" / "rabbet.safetensors"
    spare.write_bytes(stored.files[0].read_bytes())
    with pytest.raises(FileError, match=r"files of two networks, rabbet\.safetensors and rabbet-"):
        hf.from_pretrained(tmp_path / "out")
    spare.rename(tmp_path / "out" / "rabbet-00001-of-00009.safetensors")
    with pytest.raises(FileError, match=r"files of two networks|lacks"):
        hf.from_pretrained(tmp_path / "out")
    result = rabbet.compress(llama(), "bpw <= 6", task(), QUICK)
    hf.save_pretrained(result, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").glob("*.safetensors")] == ["rabbet.safetensors"]


@pytest.mark.parametrize("make", [neox, bart])
def test_tensors_under_other_names_and_buffers_are_those_of_the_network(make, tmp_path):
    make().save_pretrained(tmp_path / "in")
    both = make is bart
    stored = compressed(tmp_path / "in", tmp_path / "out", both, "bytes <= 60%")
    assert sum(p.stat().st_size for p in stored.files) == stored.cost.bytes
    wanted, found = answers(make(), both), answers(hf.from_pretrained(tmp_path / "out"), both)
    assert float((wanted - found).norm() / wanted.norm()) < 0.2


def test_what_transformers_puts_together_of_several_tensors_is_refused(tmp_path):
    mixtral().save_pretrained(tmp_path / "in")
    with pytest.raises(FileError, match=r"lack the tensor .*experts.*from_pretrained\(folder\)"):
        compressed(tmp_path / "in", tmp_path / "out")


def test_blocks_that_hand_on_more_than_hidden_states_are_refused(tmp_path):
    t5().save_pretrained(tmp_path / "in")
    with pytest.raises(ModelError, match="is given what another block returns besides"):
        compressed(tmp_path / "in", tmp_path / "out", both=True)


def test_a_block_that_stands_in_the_list_twice_is_refused():
    model = llama()
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(ModelError, match="holds a block several times"):
        rabbet.compress(model, "bpw <= 6", task(), QUICK)


def test_a_network_that_is_quantised_already_is_refused(tmp_path):
    llama().save_pretrained(tmp_path / "in")
    path = tmp_path / "in" / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    for kind, shown in ((torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")):
        save_file(tensors | {name: tensors[name].to(kind)}, path, {"format": "pt"})
        with pytest.raises(FileError, match=f"stored as {shown}: the network is quantised"):
            compressed(tmp_path / "in", tmp_path / "out")


BROKEN = {
    "no weights": ("holds no model.safetensors", lambda t: None),
    "another shape": (r"is \[48, 31\] in the files, \[48, 32\]",
                      lambda t: t | {"lm_head.weight": torch.zeros(48, 31)}),
    "one is missing": ("lack the tensor 'lm_head.weight'",
                       lambda t: {n: v for n, v in t.items() if n != "lm_head.weight"}),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_weights_are_named_before_anything_runs(case, tmp_path):
    llama().save_pretrained(tmp_path / "in")
    path = tmp_path / "in" / "model.safetensors"
    why, change = BROKEN[case]
    tensors = change(load_file(path))
    path.unlink()
    if tensors is not None:
        save_file(tensors, path, {"format": "pt"})
    with pytest.raises(FileError, match=why):
        compressed(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize(
    "index", [[], {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a": 3}},
              {"weight_map": {"a": "../b"}}, {}, 3],
)  # fmt: skip
def test_an_index_that_says_nonsense_is_refused(index, tmp_path):
    llama().save_pretrained(tmp_path / "in")
    (tmp_path / "in" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileError, match=r"index\.json|holds no 3"):
        compressed(tmp_path / "in", tmp_path / "out")


def test_tensors_of_no_use_and_a_missing_prefix_change_nothing(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path / "in")
    wanted = compressed(tmp_path / "in", tmp_path / "out").files[0].read_bytes()
    path = tmp_path / "in" / "model.safetensors"
    tensors = {n.removeprefix("model."): t for n, t in load_file(path).items()}
    save_file(tensors | {"spare.weight": torch.zeros(3)}, path, {"format": "pt"})
    assert compressed(tmp_path / "in", tmp_path / "again").files[0].read_bytes() == wanted


def test_a_place_that_cannot_be_written_is_an_error_of_files(tmp_path):
    llama().save_pretrained(tmp_path / "in")
    (tmp_path / "in" / "tokenizer.json").write_text("{}")
    (tmp_path / "out" / "tokenizer.json").mkdir(parents=True)
    with pytest.raises(FileError, match=r"cannot write .*tokenizer"):
        compressed(tmp_path / "in", tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot write into"):
        compressed(tmp_path / "in", tmp_path / "file")
