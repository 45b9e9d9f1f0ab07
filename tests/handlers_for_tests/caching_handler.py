"""Answers what it has seen before without asking the network."""

from stock_handler import StockHandler


class CachingHandler(StockHandler):
    def handle(self, data, context):
        self.cache = getattr(self, "cache", {})
        keys = [bytes(item["body"]) for item in data]
        new = [index for index, key in enumerate(keys) if key not in self.cache]
        if new:
            answers = super().handle([data[index] for index in new], context)
            self.cache.update(zip([keys[index] for index in new], answers, strict=True))
        return [self.cache[key] for key in keys]
