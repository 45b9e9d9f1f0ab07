"""A FastAPI service around a guarded network: pixels in, label and verdict out.

WEIGHTS=weights.safetensors ARCHITECTURE=my_net:make BUNDLES=bundles uvicorn fastapi_app:app
"""

import os
from contextlib import asynccontextmanager
from uuid import uuid4

import numpy as np
from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool

from guard import GuardedModel, SuspectModel
from guard.serving.guarded_model import RowRequests


@asynccontextmanager
async def lifespan(app: FastAPI):
    suspect = SuspectModel.load(os.environ["WEIGHTS"], architecture=os.environ["ARCHITECTURE"])
    with GuardedModel(suspect.module, bundles=os.environ["BUNDLES"], name="digits") as app.state.model:
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/predict")
async def predict(request: Request) -> dict[str, object]:
    """Take the bytes of one float32 input, as the network takes it."""
    model = request.app.state.model
    body = await request.body()
    if len(body) != 4 * np.prod(model.input_shape):
        raise HTTPException(400, f"send float32 values of shape {model.input_shape}")
    row = np.frombuffer(body, "<f4").reshape(1, *model.input_shape)
    sender = RowRequests([request.headers.get("x-request-id") or str(uuid4())], [request.headers])
    (answer,) = await run_in_threadpool(model.answer, row, sender)
    if answer.logits is None:  # blocked, rejected or failed
        raise HTTPException(answer.response.status, answer.error, headers=answer.response.headers)
    return {"label": int(answer.logits.argmax()), "verdict": answer.verdict, "action": answer.action}
