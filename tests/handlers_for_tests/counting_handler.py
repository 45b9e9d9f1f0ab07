"""Remembers how much it has answered, and tells it."""

from stock_handler import StockHandler


class CountingHandler(StockHandler):
    answered = 0

    def postprocess(self, data):
        answers = super().postprocess(data)
        for answer in answers:
            self.answered += 1
            answer["number"] = self.answered
        return answers
