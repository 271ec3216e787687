"""An OpenAI-compatible HTTP server over the engine; needs the extra `serve`.

    request --bodies.py--> bytes --inputs.py, protocol.py--> Request --Service--> pieces
    pieces --chat_completions.py--> one JSON document or server-sent events

`app.py` has the routes, `access.py` who may use them, `run.py` the process. Only `mis_jax.cli`
imports this folder.
"""
