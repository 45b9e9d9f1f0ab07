"""Like TorchServe's image_classifier, without torchvision: base64, bytes or JSON in, top two classes out."""

import base64
import io

import numpy as np
import torch
from PIL import Image
from ts.torch_handler.base_handler import BaseHandler
from ts.utils.util import map_class_to_label


class ClassifierHandler(BaseHandler):
    def preprocess(self, data):
        return torch.stack([self.decode(row.get("data") or row.get("body")) for row in data]).to(self.device)

    def postprocess(self, data):
        probabilities, classes = torch.topk(data.softmax(1), 2, dim=1)
        return map_class_to_label(probabilities.tolist(), self.mapping, classes.tolist())

    def decode(self, image):
        if isinstance(image, str):
            image = base64.b64decode(image)
        if isinstance(image, (bytearray, bytes)):
            pixels = np.asarray(Image.open(io.BytesIO(image)).convert("L"), dtype=np.float32) / 255
            return torch.from_numpy(pixels)[None]
        return torch.tensor(image, dtype=torch.float32)
