"""Runs files of networks with their runtime alone: `python run_file.py FORMAT FILE...`.

Beside each file are its images, `images.npy`; its logits become `logits.npy`.
"""

import sys
from pathlib import Path

import numpy as np


def timm(file, images):
    import timm as library
    import torch

    return library.create_model(f"local-dir:{file}", pretrained=True).eval()(torch.from_numpy(images)).detach().numpy()


def pt2(file, images):
    import torch

    return torch.export.load(file).module()(torch.from_numpy(images)).detach().numpy()


def onnx(file, images):
    import onnxruntime

    return onnxruntime.InferenceSession(file).run(None, {"images": images})[0]


def openvino(file, images):
    import openvino as library

    settings = {"EXECUTION_MODE_HINT": "ACCURACY"}
    return library.Core().compile_model(f"{file}/model.xml", "CPU", settings)(images)[0]


def executorch(file, images):
    import torch
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(file).load_method("forward")
    return np.concatenate([method.execute([torch.from_numpy(image[None])])[0].numpy().copy() for image in images])


def litert(file, images):
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(file)
    interpreter.allocate_tensors()
    logits = []
    for image in images:
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], image[None])
        interpreter.invoke()
        logits.append(interpreter.get_tensor(interpreter.get_output_details()[0]["index"]))
    return np.concatenate(logits)


if __name__ == "__main__":
    name, *files = sys.argv[1:]
    for module in {"dvn_cli", "timm", "torch"} - {
        "timm": {"timm", "torch"},
        "pt2": {"torch"},
        "executorch": {"torch"},
    }.get(name, set()):
        sys.modules[module] = None
    for file in files:
        folder = Path(file).parent
        np.save(folder / "logits.npy", globals()[name](file, np.load(folder / "images.npy")))
