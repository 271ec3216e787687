"""An OpenAI-compatible HTTP server over the engine; needs the extra `serve`.

    request --body.py--> bytes --schemas.py, prompts.py, images.py--> Request --Service--> pieces
    pieces --answers.py--> one JSON document or server-sent events

`app.py` has the routes, `server.py` the process. Only `mis_jax.cli` imports this folder.
"""
