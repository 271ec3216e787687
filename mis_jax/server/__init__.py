"""An OpenAI-compatible HTTP server over the engine; needs the extra `serve`.

    request --bodies.py--> bytes --schemas.py, inputs.py, images.py--> Request --Service--> pieces
    pieces --engine_stream.py--> one JSON document or server-sent events

`app.py` has the routes, `server.py` the process. Only `mis_jax.cli` imports this folder.
"""
