"""Published weights into backbones."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from dvn_cli.backbones import load_pretrained, load_weights, resolve
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


@pytest.mark.parametrize(
    "write",
    [
        save_safetensors,
        save_torch,
        lambda state, path: save_torch({"state_dict": state, "epoch": 3}, path),
        lambda state, path: save_torch({"model": {f"module.{name}": value for name, value in state.items()}}, path),
    ],
    ids=["safetensors", "torch", "wrapped", "prefixed"],
)
def test_published_forms(write, tmp_path):
    state = SPEC.build().state_dict()
    module = SPEC.build()
    assert not equal(state, module.state_dict())
    assert load_weights(module, SPEC, write(state, tmp_path / "weights")) == []
    assert equal(state, module.state_dict())


def test_a_classifier_of_other_classes_stays_as_it_was(tmp_path):
    state = replace(SPEC, num_classes=12).build().state_dict()
    module = SPEC.build()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    assert load_weights(module, SPEC, save_safetensors(state, tmp_path / "w")) == ["fc.bias", "fc.weight"]
    assert torch.equal(module.fc.weight, before["fc.weight"])
    del state["fc.weight"], state["fc.bias"]
    assert equal(state, module.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("fc.weight"), "fc.weight is missing"),
        (lambda s: s.update(extra=torch.ones(1)), "extra is unknown"),
        (lambda s: s.update({"conv1.weight": torch.ones(16, 1, 3, 3)}), r"conv1.weight has shape \[16, 1, 3, 3\]"),
        (lambda s: s.update({"fc.weight": torch.ones(12, 32)}), r"fc.weight has shape \[12, 32\], not \[10, 64\]"),
        (lambda s: [s.pop(name) for name in list(s) if "layer2" in name], "and 7 more"),
    ],
)
def test_other_weights_are_refused(change, message, tmp_path):
    state = SPEC.build().state_dict()
    change(state)
    with pytest.raises(InputError, match=message) as caught:
        load_weights(SPEC.build(), SPEC, save_torch(dict(state), tmp_path / "w.pt"))
    assert "\n" not in str(caught.value)


def test_what_is_no_file_of_weights(tmp_path):
    with pytest.raises(InputError, match="no file"):
        load_weights(SPEC.build(), SPEC, tmp_path / "none.pt")
    for name in ("w.pt", "w.safetensors"):
        (tmp_path / name).write_bytes(b"not weights")
        with pytest.raises(InputError, match="not a file of weights") as caught:
            load_weights(SPEC.build(), SPEC, tmp_path / name)
        assert "\n" not in str(caught.value)
    torch.save({"model": SPEC.build()}, tmp_path / "pickled.pt")  # code, which is not run
    with pytest.raises(InputError, match="not a file of weights"):
        load_weights(SPEC.build(), SPEC, tmp_path / "pickled.pt")


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
