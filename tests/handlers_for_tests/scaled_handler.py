"""Its own `initialize`, with a helper, a settings file and the archive's YAML; its own headers and status."""

import io
import json
from pathlib import Path

import numpy as np
import torch
from mnist_network import Network
from PIL import Image
from scaling.helper import scaled


class ScaledHandler:
    def initialize(self, context):
        folder = Path(context.system_properties["model_dir"])
        self.scale = json.loads((folder / "scaling" / "scale.json").read_text())["scale"]
        self.word = context.model_yaml_config["handler"]["word"]
        self.net = Network()
        state = torch.load(folder / context.manifest["model"]["serializedFile"], weights_only=True)
        self.net.load_state_dict(state)
        self.net.eval()
        print("network loaded")

    def preprocess(self, data):
        images = [np.asarray(Image.open(io.BytesIO(row["body"])), dtype=np.float32) for row in data]
        return torch.stack([scaled(torch.from_numpy(image)[None], self.scale) for image in images])

    def handle(self, data, context):
        with torch.inference_mode():
            labels = self.net(self.preprocess(data)).argmax(1).tolist()
        for index, label in enumerate(labels):
            context.set_response_status(code=203, phrase="As You Like", idx=index)
            context.set_response_header(index, "X-Digit", str(label))
            context.set_response_content_type(index, "text/plain")
        return [f"{self.word} {label}" for label in labels]
