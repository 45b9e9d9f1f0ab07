"""Runs every image of a batch once, however often it was sent."""

from stock_handler import StockHandler


class DeduplicatingHandler(StockHandler):
    def handle(self, data, context):
        places = {}
        for item in data:
            places.setdefault(bytes(item["body"]), len(places))
        answers = super().handle([{"body": body} for body in places], context)
        return [answers[places[bytes(item["body"])]] for item in data]
