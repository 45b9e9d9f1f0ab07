"""The REST half of the open inference protocol as an OpenAPI document, with what this server adds to it."""

from __future__ import annotations

from typing import Any

from guard.v2.protocol import DTYPES

Json = dict[str, Any]

_TEXT: Json = {"type": "string", "maxLength": 1024}
_PARAMETERS: Json = {
    "type": "object",
    "additionalProperties": {"type": ["string", "number", "boolean"]},
}
_SHAPE: Json = {"type": "array", "maxItems": 16, "items": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}}


def describe(title: str, version: str, *, has_key: bool) -> Json:
    """Return the document.

    Parameters
    ----------
    title, version : str
    has_key : bool
        Whether calls need one.
    """
    at_model = "/v2/models/{name}"
    paths: Json = {
        "/v2/health/live": {"get": _reading("Whether the server runs.", _flag("live"), is_open=True)},
        "/v2/health/ready": {"get": _reading("Whether every model is ready.", _flag("ready"), is_open=True)},
        "/v2": {"get": _reading("The server.", {"$ref": "#/components/schemas/Server"})},
    }
    for path in (at_model, f"{at_model}/versions/{{version}}"):
        paths[path] = {"get": _reading("The model.", {"$ref": "#/components/schemas/Model"}, path)}
        ready = _object({"name": _TEXT, "ready": {"type": "boolean"}})
        paths[f"{path}/ready"] = {"get": _reading("Whether the model is ready.", ready, path)}
        paths[f"{path}/infer"] = {"post": _inference(path)}
    document: Json = {
        "openapi": "3.1.0",
        "info": {"title": title, "version": version},
        "paths": paths,
        "components": {"schemas": _schemas()},
    }
    if has_key:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


def _reading(summary: str, schema: Json, path: str = "", *, is_open: bool = False) -> Json:
    responses: Json = {"200": {"description": summary, "content": {"application/json": {"schema": schema}}}}
    responses |= {} if is_open else _refusals("401", *(["404"] if path else []))
    operation: Json = {"summary": summary, "parameters": _of_path(path), "responses": responses}
    return operation | ({"security": []} if is_open else {})


def _inference(path: str) -> Json:
    json_bytes: Json = {
        "name": "Inference-Header-Content-Length",
        "in": "header",
        "description": "Bytes of the JSON, where binary tensors follow it.",
        "schema": {"type": "integer", "minimum": 0},
    }
    answer: Json = {
        "description": "An answer and a verdict for every row.",
        "headers": {
            "Inference-Header-Content-Length": {
                "description": "As in the request.",
                "schema": {"type": "integer"},
            }
        },
        "content": {
            "application/json": {"schema": {"$ref": "#/components/schemas/InferenceResponse"}},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    }
    return {
        "summary": "Answer rows, and judge each.",
        "parameters": [*_of_path(path), json_bytes],
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/InferenceRequest"}}},
        },
        "responses": {
            "200": answer,
            **_refusals("400", "401", "403", "404", "408", "413", "415", "422", "500", "503", "507"),
        },
    }


def _of_path(path: str) -> list[Json]:
    return [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in ("name", "version")
        if f"{{{name}}}" in path
    ]


def _refusals(*statuses: str) -> Json:
    meanings = {
        "400": "The request breaks the protocol.",
        "401": "The key is missing or wrong.",
        "403": "The guard blocks the input.",
        "404": "There is no such model or version.",
        "408": "The body did not come in time.",
        "413": "The body, its JSON or its number of rows is too large.",
        "415": "The body is encoded.",
        "422": "The input cannot be scored, or is blocked.",
        "500": "The model failed on the input.",
        "503": "The server is full. Try again after Retry-After seconds.",
        "507": "The input needs more memory than there is.",
    }
    schema = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {status: {"description": meanings[status], "content": schema} for status in statuses}


def _schemas() -> Json:
    tensor: Json = {"name": _TEXT, "datatype": {"enum": sorted(DTYPES)}, "shape": _SHAPE}
    values: Json = {"type": "array", "items": {"type": ["number", "boolean", "array"]}}
    binary: Json = {"binary_data_size": {"type": "integer", "minimum": 0}}
    given: Json = {
        **_object({**tensor, "data": values, "parameters": {**_PARAMETERS, "properties": binary}}),
        "required": ["name", "datatype", "shape"],
        "description": "With data, or with the parameter binary_data_size and its bytes behind the JSON.",
    }
    wanted: Json = {
        **_object({"name": _TEXT, "parameters": {**_PARAMETERS, "properties": {"binary_data": {"type": "boolean"}}}}),
        "required": ["name"],
    }
    told: Json = {
        **_object(
            {
                "name": _TEXT,
                "datatype": {"enum": [*sorted(DTYPES), "BYTES"]},
                "shape": _SHAPE,
                "data": {"type": "array", "items": {"type": ["number", "string", "null"]}},
                "parameters": {**_PARAMETERS, "properties": binary},
            }
        ),
        "required": ["name", "datatype", "shape"],
    }
    named_shape = _object({"name": _TEXT, "datatype": _TEXT, "shape": {"type": "array", "items": {"type": "integer"}}})
    texts: Json = {"type": "array", "items": {"type": "string"}}
    return {
        "Error": _object({"error": {"type": "string"}}),
        "Server": _object({"name": _TEXT, "version": _TEXT, "extensions": texts}),
        "Model": _object(
            {
                "name": _TEXT,
                "versions": texts,
                "platform": _TEXT,
                "inputs": {"type": "array", "items": named_shape},
                "outputs": {"type": "array", "items": named_shape},
            }
        ),
        "InferenceRequest": {
            **_object(
                {
                    "id": _TEXT,
                    "parameters": _PARAMETERS,
                    "inputs": {"type": "array", "items": given},
                    "outputs": {"type": "array", "items": wanted},
                }
            ),
            "required": ["inputs"],
        },
        "InferenceResponse": {
            **_object(
                {
                    "model_name": _TEXT,
                    "model_version": _TEXT,
                    "id": {"type": "string"},
                    "parameters": _PARAMETERS,
                    "outputs": {"type": "array", "items": told},
                }
            ),
            "required": ["model_name", "outputs"],
        },
    }


def _flag(name: str) -> Json:
    return _object({name: {"type": "boolean"}})


def _object(properties: Json) -> Json:
    return {"type": "object", "properties": properties, "required": [*properties]}
