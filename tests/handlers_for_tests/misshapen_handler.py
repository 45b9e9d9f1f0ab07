"""Answers a batch with something else than a list of one answer per request, and one request well."""

from stock_handler import StockHandler


class MisshapenHandler(StockHandler):
    def handle(self, data, context):
        answers = super().handle(data, context)
        return answers if len(data) == 1 else dict(enumerate(answers)) if len(data) == 2 else answers[1:]
