"""A model of Triton's Python backend around a guarded network; the verdict of every row is an output."""

import json

import numpy as np
import triton_python_backend_utils as triton

from guard import GuardedModel, SuspectModel


class TritonPythonModel:
    """Takes `input`, rows as the network takes them; what Triton has put together is answered in one call."""

    def initialize(self, args):
        parameters = json.loads(args["model_config"])["parameters"]
        weights, architecture, bundles = (
            parameters[name]["string_value"] for name in ("weights", "architecture", "bundles")
        )
        suspect = SuspectModel.load(weights, architecture=architecture)
        self.model = GuardedModel(suspect.module, bundles=bundles, name=args["model_name"], verdict_detail="full")

    def execute(self, requests):
        rows = [triton.get_input_tensor_by_name(request, "input").as_numpy() for request in requests]
        columns = self.model.columns(self.model.answer(np.concatenate(rows).astype(np.float32)))
        columns["guard_verdict"] = columns["guard_verdict"].astype(object)  # texts of Triton are objects
        ends = np.cumsum([len(each) for each in rows])[:-1]
        parts = {name: np.split(values, ends) for name, values in columns.items()}
        return [
            triton.InferenceResponse([triton.Tensor(name, parts[name][number]) for name in parts])
            for number in range(len(requests))
        ]

    def finalize(self):
        self.model.close()
