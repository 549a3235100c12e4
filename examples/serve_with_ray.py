"""Two replicas of `dgq serve` behind one address, by Ray Serve: python examples/serve_with_ray.py [MODEL] [REPLICAS]"""

import concurrent.futures
import json
import sys
import urllib.request

from ray import serve

from dgq.pictures.pipelines import find_model, load
from dgq.serving.app import create_app
from dgq.serving.drawing import Drawer

model = sys.argv[1] if len(sys.argv) > 1 else None  # a folder, a hub id, or the embedded model
replicas = int(sys.argv[2]) if len(sys.argv) > 2 else 2
HOST, PORT = "127.0.0.1", 8000


def application():
    """What a replica answers with: built there, as no pipeline travels."""
    found = find_model(model)
    return create_app(Drawer(load(found), found), hosts=frozenset({HOST, "localhost"}))


# on GPUs: ray_actor_options={"num_gpus": 1}; the drawer's own queue is behind Ray's
@serve.deployment(num_replicas=replicas, max_ongoing_requests=16)
@serve.ingress(application)
class Pictures:
    """One model in one process."""


def ask(seed):
    body = json.dumps({"prompt": "a cat", "seed": seed, "steps": 4}).encode()
    request = urllib.request.Request(
        f"http://{HOST}:{PORT}/v1/images/generations", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["data"][0]


serve.start(http_options={"host": HOST, "port": PORT})
serve.run(Pictures.bind())
with concurrent.futures.ThreadPoolExecutor(8) as clients:
    pictures = list(clients.map(ask, [*range(8), *range(8)]))
same = [pictures[i]["b64_json"] == pictures[i + 8]["b64_json"] for i in range(8)]
print(f"{len(pictures)} pictures of {replicas} replicas; a seed's are the same: {all(same)}")
serve.shutdown()
