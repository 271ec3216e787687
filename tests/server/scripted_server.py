"""A server process with a scripted engine: `python scripted_server.py CHECKPOINT PAUSE DRAIN`."""

import sys
from pathlib import Path

from scripted_engine import CONTEXT, ScriptedEngine

from mis_jax.checkpoint.hf.config import read_config
from mis_jax.data.processor import Processor
from mis_jax.inference.async_engine import Service
from mis_jax.server.access import Settings
from mis_jax.server.app import create_app
from mis_jax.server.run import address_of, bind, serve_app

folder, pause, drain = Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
processor = Processor.from_folder(folder, read_config(folder)[0])
service = Service(ScriptedEngine(processor, rows=1, pause=pause), max_concurrent=1, max_queue=2)
bound = bind("127.0.0.1", 0)
serve_app(
    create_app(service, processor, Settings("scripted", CONTEXT)),
    service,
    bound,
    drain=drain,
    started=lambda: print(address_of(bound), flush=True),
)
