"""Published weights into backbones."""

import zipfile
from argparse import Namespace
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from dvn_cli.backbones import load_pretrained, load_weights, resolve
from dvn_cli.backbones.state_dicts import find
from dvn_cli.errors import DvnError, InputError

SPEC = resolve("wrn_8_1", 10)


def save_safetensors(state, path):
    save_file(state, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


def save_torch(state, path):
    torch.save(state, path)
    return path


def equal(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


class Marker:
    """A class that no reader knows."""

    def __init__(self):
        self.ran = True


def load(content, tmp_path, spec=SPEC, save=save_torch):
    """What loading a file with this content gives: the module, the classifier's names left out, and the notes."""
    module, notes = spec.build(), []
    left_out = load_weights(module, spec, save(content, tmp_path / "weights"), notes.append)
    return module, left_out, notes


@pytest.mark.parametrize("save", [save_safetensors, save_torch])
def test_plain_files_load_without_a_word(save, tmp_path):
    state = SPEC.build().state_dict()
    assert not equal(state, SPEC.build().state_dict())
    module, left_out, notes = load(state, tmp_path, save=save)
    assert equal(state, module.state_dict())
    assert not left_out
    assert not notes


def test_modules_that_look_for_the_version_beside_their_tensors_find_their_own(tmp_path):
    spec = resolve("torchvision/mnasnet0_5", 3)
    state = dict(spec.build().state_dict())
    module, left_out, _ = load(state, tmp_path, spec)
    assert equal(state, module.state_dict())
    assert not left_out


@pytest.mark.parametrize("name", ["model_best", "PLAIN.SAFETENSORS", "weights.pth"])
def test_the_content_says_what_a_file_is_not_the_suffix(name, tmp_path):
    state, module = SPEC.build().state_dict(), SPEC.build()
    save_file(state, tmp_path / name)
    load_weights(module, SPEC, tmp_path / name)
    assert equal(state, module.state_dict())
    torch.save(state, tmp_path / "torch.safetensors")
    module = SPEC.build()
    load_weights(module, SPEC, tmp_path / "torch.safetensors")
    assert equal(state, module.state_dict())


def under(prefix, state):
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (lambda s: {"state_dict": s, "epoch": 3, "args": Namespace(lr=0.1)}, ["taken from 'state_dict'"]),
        (lambda s: {"net": s, "acc": 91.2}, ["taken from 'net'"]),
        (lambda s: {"anything": s, "best": Marker(), "momentum": {"a": torch.ones(3)}}, ["taken from 'anything'"]),
        (lambda s: {"run": {"weights": s}}, ["taken from 'run.weights'"]),
        (lambda s: {"model": zeros(s), "model_ema": s}, ["taken from 'model_ema', not from 'model'"]),
        (lambda s: under("_orig_mod.module.", s), ["'_orig_mod.module.' removed from the names"]),
        (lambda s: {"model": under("backbone.", s)}, ["taken from 'model'", "'backbone.' removed"]),
        (lambda s: {**under("encoder.", s), "decoder.w": torch.ones(2)}, ["left out", "(decoder.w)"]),
        (lambda s: {"n_averaged": torch.tensor(5), **under("module.", s)}, ["counters left out (n_averaged)"]),
        (lambda s: {**s, "total_ops": torch.zeros(1), "conv1.total_params": torch.zeros(1)}, ["counters left out"]),
        (lambda s: {**s, "epoch": 3}, []),
        (lambda s: {n: v for n, v in s.items() if "num_batches" not in n}, []),
        (lambda s: {n: v.double() if v.is_floating_point() else v for n, v in s.items()}, []),
    ],
)  # fmt: skip
def test_what_lies_around_the_weights_is_taken_off_and_named(wrap, said, tmp_path):
    state = SPEC.build().state_dict()
    module, left_out, notes = load(wrap(state), tmp_path)
    assert equal(state, module.state_dict())
    assert not left_out
    assert len(notes) == bool(said)
    assert all(part in notes[0] for part in said)


def zeros(state):
    return {name: torch.zeros_like(value) for name, value in state.items()}


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.sampled_from(["module", "_orig_mod", "model", "backbone", "net", "encoder_q"]), max_size=3),
    st.lists(st.sampled_from(["model", "state_dict", "net", "model_state_dict", "params"]), max_size=2),
)
def test_any_stack_of_prefixes_and_keys(prefixes, keys):
    state = SPEC.build("meta").state_dict()
    content = under("".join(f"{prefix}." for prefix in prefixes), state)
    for key in keys:
        content = {key: content, "epoch": 3}
    assert find(content, state, "w").state == state


def test_a_classifier_of_other_classes_stays_as_it_was(tmp_path):
    state = replace(SPEC, num_classes=12).build().state_dict()
    torch.manual_seed(1)
    before = SPEC.build().state_dict()
    torch.manual_seed(1)
    module, left_out, notes = load(state, tmp_path)
    assert left_out == ["fc.weight", "fc.bias"]
    assert notes == ["The weights have other classes: fc.weight, fc.bias are not loaded."]
    assert torch.equal(module.fc.weight, before["fc.weight"])
    del state["fc.weight"], state["fc.bias"]
    assert equal(state, module.state_dict())


@pytest.mark.parametrize("other", [{}, {"fc.0.weight": torch.ones(3, 3), "fc.2.weight": torch.ones(3, 3)}])
def test_a_file_without_our_classifier(other, tmp_path):
    state = {name: value for name, value in SPEC.build().state_dict().items() if not name.startswith("fc.")}
    module, left_out, notes = load(state | other, tmp_path)
    assert equal(state, module.state_dict())
    assert left_out == ["fc.weight", "fc.bias"]
    assert "no classifier: fc.weight, fc.bias are not loaded" in notes[-1]
    assert len(notes) == 1 + bool(other)


@pytest.mark.parametrize(("there", "here"), [(1, 3), (3, 1)])
def test_the_input_layer_is_adapted_to_the_channels_as_timm_does(there, here, tmp_path):
    state = replace(SPEC, in_chans=there).build().state_dict()
    module, left_out, notes = load(state, tmp_path, replace(SPEC, in_chans=here))
    assert not left_out
    assert notes[0].endswith(f"conv1.weight adapted from {there} to {here} channels.")
    grey = torch.rand(2, 1, 8, 8)
    first, last = (x.expand(-1, channels, -1, -1) for x, channels in ((grey, there), (grey, here)))
    own = torch.nn.functional.conv2d(first, state["conv1.weight"])
    torch.testing.assert_close(torch.nn.functional.conv2d(last, module.conv1.weight), own)


@pytest.mark.parametrize("name", ["test_vit", pytest.param("torchvision/vit_b_32", marks=pytest.mark.slow)])
def test_tables_follow_the_size_of_the_images(name, tmp_path):
    spec = replace(resolve(name, 10), input_size=(96, 96))
    state = resolve(name, 10).build().state_dict()
    table = next(n for n in state if "pos_embed" in n)
    module, left_out, notes = load(state, tmp_path, spec)
    own = module.state_dict()
    assert not left_out
    assert f"{table} resized from {list(state[table].shape)} to {list(own[table].shape)}" in notes[0]
    assert torch.equal(own[table][0, 0], state[table][0, 0]) or name == "test_vit"
    assert all(torch.equal(value, own[n]) for n, value in state.items() if n != table)


@pytest.mark.slow
def test_tables_of_relative_positions_follow_too(tmp_path):
    own = resolve("swin_tiny_patch4_window7_224", 10)
    state = own.build().state_dict()
    smaller = replace(own, input_size=(64, 64))
    module, _, notes = load(state, tmp_path, smaller)
    assert "relative_position_bias_table resized" in notes[0]
    assert torch.equal(module.layers[0].blocks[0].mlp.fc1.weight, state["layers.0.blocks.0.mlp.fc1.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("fc.weight"), "fc.weight is missing"),
        (lambda s: s.update(extra=torch.ones(1)), "extra is unknown"),
        (lambda s: s.update({"conv1.weight": torch.ones(16, 3, 5, 5)}), r"conv1.weight has shape \[16, 3, 5, 5\]"),
        (lambda s: s.update({"fc.weight": torch.ones(12, 32)}), r"fc.weight has shape \[12, 32\], not \[10, 64\]"),
        (lambda s: [s.pop(name) for name in list(s) if "layer2" in name], "and 7 more"),
        (lambda s: s.update(trunk=s.pop("conv1.weight")), r"conv1.weight is missing.*; it has trunk"),
        (lambda s: s.update({"bn1.bias": [1.0]}), "bn1.bias is no tensor but a list"),
        (lambda s: s.update({"bn1.bias": s["bn1.bias"].char()}), r"bn1.bias is quantised \(torch.int8\)"),
        (lambda s: s.update({"bn1.bias": s["bn1.bias"].to_sparse()}), "bn1.bias is sparse .*to_dense"),
        (lambda s: s.update(extra=s["bn1.bias"].to_sparse()), "extra is sparse .*to_dense"),
        (
            lambda s: s.update({"fc.weight": torch.ones(1).expand(10**9, 64)}),
            "fc.weight repeats the values .* 238.4 GiB",
        ),
        (lambda s: s.update({"bn1.bias": s["bn1.bias"].to("meta")}), "bn1.bias has a shape but no values"),
        (lambda s: s["bn1.running_var"].fill_(torch.inf), "bn1.running_var has values that are not finite"),
        (lambda s: s["fc.weight"][3].fill_(torch.nan), "fc.weight has values that are not finite"),
    ],
)
def test_other_weights_are_refused(change, message, tmp_path):
    state = SPEC.build().state_dict()
    change(state)
    module = SPEC.build()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(InputError, match=message) as caught:
        load_weights(module, SPEC, save_torch(dict(state), tmp_path / "w.pt"))
    assert "\n" not in str(caught.value)
    assert equal(before, module.state_dict())


@pytest.mark.parametrize("kind", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "pointer of Git LFS"),
        (b"<!DOCTYPE html><html>Virus scan warning</html>", "a web page"),
        (b"\n <html>", "a web page"),
        (b'{"weight_map": {}}', "JSON"),
        (b"", "empty"),
        (b"not weights", "no known kind"),
        (b"PK\x03\x04" + bytes(300), "damaged or cut short"),
        ((10**6).to_bytes(8, "little") + b'{"a": ', "its safetensors header or data are damaged"),
    ],
)
def test_what_is_no_file_of_weights_is_named_for_what_it_is(kind, content, what, tmp_path):
    path = tmp_path / f"w{kind}"
    path.write_bytes(content)
    refused(path, what)


def test_pickled_objects_are_not_opened_and_named(tmp_path):
    module = SPEC.build()
    for content in (module, {"model": module, "epoch": 3}, {"a": {"b": module}}):
        refused(save_torch(content, tmp_path / "w.pt"), "a whole pickled module .*PaperResNet.*state_dict")
    torch.save(module, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    refused(tmp_path / "w.pt", "cannot be read safely.*state_dict")
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "w.pt")
    refused(tmp_path / "w.pt", "a TorchScript module")


def test_what_holds_no_tensors_by_name(tmp_path):
    for content, what in (([torch.ones(2)], "a list"), ({"epoch": 3}, "but epoch"), ({}, "holds nothing")):
        refused(save_torch(content, tmp_path / "w.pt"), what)
    refused(tmp_path / "none.pt", "there is no file")
    refused(tmp_path, "is a folder")


def refused(path, what):
    with pytest.raises(InputError, match=what) as caught:
        load_weights(SPEC.build(), SPEC, path)
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)


def test_what_is_packed_or_nested_without_end(tmp_path):
    state = SPEC.build().state_dict()
    shared = dict(state)
    for _ in range(40):
        shared = {"a": shared, "b": shared}
    circle = {"x": 3}
    circle["x"] = circle
    deep = {"x": 3}
    for _ in range(300):
        deep = {"x": deep}
    assert load(shared, tmp_path)[2] == [f"{tmp_path}/weights: taken from '{'.'.join('a' * 40)}'."]
    for content in (circle, deep):
        refused(save_torch(content, tmp_path / "w.pt"), "it has no tensors by name, but x")
    torch.save(state, tmp_path / "w.pt")
    content = (tmp_path / "w.pt").read_bytes()
    with (
        zipfile.ZipFile(tmp_path / "w.pt") as old,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, bytes(100 << 20) if name.endswith("data/0") else old.read(name))
    refused(tmp_path / "b.pt", "it would unpack to 0.1 GiB")
    (tmp_path / "c.pt").write_bytes(content.replace(b"PK\x01\x02", b"PK\x01\x03"))
    refused(tmp_path / "c.pt", "damaged or cut short")


def test_eight_bits_are_weights_too(tmp_path):
    state = {name: value.clone() for name, value in SPEC.build().state_dict().items()}
    state["conv1.weight"] = state["conv1.weight"].to(torch.float8_e4m3fn)
    assert torch.equal(load(state, tmp_path)[0].conv1.weight, state["conv1.weight"].float())


def test_heads_that_the_module_is_built_without_are_dropped(tmp_path):
    from torchvision import models

    spec = resolve("torchvision/googlenet", 10)
    published = models.googlenet(weights=None, num_classes=10, aux_logits=True, init_weights=False).state_dict()
    module = spec.build()
    assert load_weights(module, spec, save_torch(published, tmp_path / "w.pth")) == []
    assert torch.equal(module.fc.weight, published["fc.weight"])


def test_pretrained_from_torchvision(tmp_path, monkeypatch):
    from torchvision import models

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    published = resolve("torchvision/squeezenet1_1").build().state_dict()
    url = models.get_model_weights("squeezenet1_1").DEFAULT.url
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(published, tmp_path / "hub" / "checkpoints" / url.rpartition("/")[2])
    spec = resolve("torchvision/squeezenet1_1", 10)
    module = spec.build()
    assert load_pretrained(module, spec) == ["classifier.1.weight", "classifier.1.bias"]
    assert torch.equal(module.features[0].weight, published["features.0.weight"])


def test_pretrained_from_timm(tmp_path, monkeypatch):
    own = resolve("test_vit")
    published = own.build().state_dict()
    fake_hub_file(tmp_path, "models--timm--test_vit.r160_in1k", published)
    offline(monkeypatch, tmp_path)
    module = own.build()
    assert load_pretrained(module, own) == []
    assert equal(published, module.state_dict())
    smaller = resolve("test_vit", 10, 1, (96, 96))  # its own input layer and position table follow
    module = smaller.build()
    before = module.head.weight.clone()
    assert load_pretrained(module, smaller) == ["head.weight", "head.bias"]
    assert torch.equal(module.head.weight, before)
    assert torch.equal(module.blocks[0].mlp.fc1.weight, published["blocks.0.mlp.fc1.weight"])


def test_pretrained_that_cannot_be_had(tmp_path, monkeypatch):
    offline(monkeypatch, tmp_path)
    spec = resolve("test_resnet")
    with pytest.raises(DvnError, match="pretrained weights of test_resnet cannot be had") as caught:
        load_pretrained(spec.build(), spec)
    assert not isinstance(caught.value, InputError)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="there are no pretrained weights of wrn_8_1"):
        load_pretrained(SPEC.build(), SPEC)


def offline(monkeypatch, cache):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))


def fake_hub_file(cache, folder, state):
    commit = "0" * 40
    snapshot = cache / folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (cache / folder / "refs").mkdir()
    (cache / folder / "refs" / "main").write_text(commit)
    save_file(state, snapshot / "model.safetensors")
