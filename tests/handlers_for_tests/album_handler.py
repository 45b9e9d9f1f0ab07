"""Takes an image, or a zip of images (an album) of which each becomes an input; bad bodies hold none."""

import io
import zipfile

import torch
from stock_handler import StockHandler


class AlbumHandler(StockHandler):
    def preprocess(self, data):
        rows = []
        for item in data:
            body = bytes(item.get("data") or item.get("body"))
            bodies = [body]
            if zipfile.is_zipfile(io.BytesIO(body)):
                with zipfile.ZipFile(io.BytesIO(body)) as album:
                    bodies = [album.read(name) for name in album.namelist()]
            rows += [self.decode(image) for image in bodies]
        return torch.stack(rows)
