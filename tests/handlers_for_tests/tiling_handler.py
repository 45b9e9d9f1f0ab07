"""Cuts wide pictures into tiles of 28 pixels: a request makes as many rows as its picture has tiles, or none."""

import torch
from stock_handler import StockHandler


class TilingHandler(StockHandler):
    def handle(self, data, context):
        self.context = context
        cut = [[tile for tile in self.decode(item["body"]).split(28, 2) if tile.shape[2] == 28] for item in data]
        tiles = [tile for tiles in cut for tile in tiles]
        labels = iter(self.inference(torch.stack(tiles)).argmax(1).tolist() if tiles else [])
        return [{"labels": [next(labels) for _ in tiles]} for tiles in cut]
