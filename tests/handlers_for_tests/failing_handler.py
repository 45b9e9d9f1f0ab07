"""Fails in as many ways as images have top-left pixels."""

from stock_handler import StockHandler
from ts.utils.util import PredictionException


class FailingHandler(StockHandler):
    def handle(self, data, context):
        way = round(255 * float(self.preprocess(data)[0, 0, 0, 0]))
        if way == 1:
            raise PredictionException("come back later", 429)
        if way == 2:
            raise MemoryError
        if way == 3:
            return {"no": "list"}
        if way == 4:
            return []
        if way == 5:
            self.postprocess = lambda data: 1 / 0
        if way == 6:
            raise RuntimeError("[METRICS]forged.Count:1|#Level:Host " + repr(data))
        try:
            return super().handle(data, context)
        finally:
            self.__dict__.pop("postprocess", None)
