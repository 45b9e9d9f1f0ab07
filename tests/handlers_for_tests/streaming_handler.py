"""Sends its answers on their way before anybody has looked at them, as handlers that stream do."""

from stock_handler import StockHandler
from ts.protocol.otf_message_handler import create_predict_response


class StreamingHandler(StockHandler):
    def postprocess(self, data):
        answers = super().postprocess(data)
        early = create_predict_response(answers, self.context.request_ids, "early", 200, self.context, True)
        self.context.cl_socket.sendall(early)
        return answers
