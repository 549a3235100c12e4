"""A client of AUTOMATIC1111's web UI against the server."""

import json
import threading

import httpx
import pytest
import webuiapi

LONG = 1000  # steps of a picture that nobody waits for


@pytest.fixture(scope="module")
def client(served):
    return webuiapi.WebUIApi(port=served.port, sampler=served.drawer.sampler, steps=2)


def test_pictures(client, served):
    found = client.txt2img(prompt="a cat", negative_prompt="a dog", seed=5, n_iter=2, batch_size=2, width=16, height=24)
    assert [image.size for image in found.images] == [(16, 24)] * 4
    assert found.info["all_seeds"] == [5, 6, 7, 8]
    assert found.image.text["parameters"] == found.info["infotexts"][0]
    assert (found.info["steps"], found.info["cfg_scale"], found.info["sampler_name"]) == (2, 7.0, "DDIM")
    wanted = {"prompt": "a cat", "seed": 8, "steps": 2, "size": "16x24", "guidance": 7, "negative_prompt": "a dog"}
    again = served.post("/v1/images/generations", json=wanted)
    assert again.json()["data"][0]["b64_json"] == found.json["images"][3]


def test_any_seed(client):
    seeds = {client.txt2img(prompt="a cat", width=16, height=16, steps=1).info["seed"] for _ in range(2)}
    assert len(seeds) == 2


def test_samplers_by_the_clients_names(client, served):
    seed = {"prompt": "a cat", "seed": 3, "width": 16, "height": 16, "steps": 2}
    drawn = {}
    for wanted in ({"sampler_name": "DDIM"}, {"sampler_name": "Euler a"}, {"sampler_index": "dpm++ 2m"}):
        answer = served.post("/sdapi/v1/txt2img", json={**seed, **wanted}).json()
        info = json.loads(answer["info"])
        assert f"Sampler: {info['sampler_name']}, " in info["infotexts"][0]
        drawn[info["sampler_name"]] = answer["images"][0]
    assert list(drawn) == ["DDIM", "Euler a", "DPM++ 2M"]
    assert len(set(drawn.values())) == 3
    wanted = {"sampler_name": "DPM++ 2M", "scheduler": "karras"}
    info = json.loads(served.post("/sdapi/v1/txt2img", json={**seed, **wanted}).json()["info"])
    assert info["sampler_name"] == "DPM++ 2M Karras"


def test_what_there_is(client, tiny_checkpoint):
    assert client.util_get_model_names() == [tiny_checkpoint.name]
    assert client.util_get_current_model() == tiny_checkpoint.name
    assert {"DDIM", "Euler a", "DPM++ 2M Karras"} < set(client.util_get_sampler_names())
    client.util_set_model(tiny_checkpoint.name)
    assert client.get_progress()["progress"] == 0
    client.util_wait_for_ready()


@pytest.mark.parametrize(
    "wanted, status, message",
    [
        ({"sampler_name": "Euler b"}, 404, "this model draws with DDIM, "),
        ({"scheduler": "Karras"}, 404, "the sampler 'DDIM Karras' is not there"),
        ({"scheduler": "SGM Uniform"}, 422, "scheduler"),
        ({"enable_hr": True}, 422, "enable_hr"),
        ({"subseed_strength": 0.5}, 422, "subseed_strength"),
        ({"styles": ["photo"]}, 422, "styles"),
        ({"alwayson_scripts": {"controlnet": {}}}, 422, "alwayson_scripts"),
        ({"script_name": "x/y plot"}, 422, "script_name"),
        ({"override_settings": {"sd_model_checkpoint": "another"}}, 422, "sd_model_checkpoint"),
        ({"override_settings": {"CLIP_stop_at_last_layers": 2}}, 422, "CLIP_stop_at_last_layers"),
        ({"width": 17}, 422, "multiple of"),
        ({"batch_size": 0}, 422, "none"),
        ({"batch_size": 4, "n_iter": 4}, 422, "16 pictures are out of range"),
        ({"prompt": "cat " * 40}, 422, "tokens"),
        ({"steps": "many"}, 422, "steps: "),
        ({"steps": True}, 422, "steps: true and false are no numbers"),
        ({"steps": 2.5}, 422, "steps: "),
        ({"seed": -2}, 422, "seed"),
    ],
    ids=repr,
)
def test_what_would_be_another_picture_is_refused(served, wanted, status, message):
    plain = {"prompt": "a cat", "steps": 1, "hr_scale": 2, "denoising_strength": 0.7, "s_noise": 1, "styles": []}
    answer = served.post("/sdapi/v1/txt2img", json={**plain, **wanted})
    assert answer.status_code == status
    assert answer.json().keys() == {"error", "detail", "body", "errors"}
    assert message in answer.json()["detail"]


@pytest.mark.parametrize("steps", [2, "2", 2.0])
def test_numbers_are_read_as_the_web_ui_reads_them(served, steps):
    answer = served.post("/sdapi/v1/txt2img", json={"prompt": "a cat", "steps": steps, "width": "16", "height": 24.0})
    info = json.loads(answer.json()["info"])
    assert (info["steps"], info["width"], info["height"]) == (2, 16, 24)


@pytest.mark.parametrize("value", ["NaN", "1e999", '[0, {"x": -Infinity}]'])
def test_what_no_answer_could_repeat_is_refused_before_it_is_drawn(served, value):
    body = f'{{"prompt": "a cat", "steps": {LONG}, "script_args": {value}}}'
    answer = served.post("/sdapi/v1/txt2img", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422
    assert answer.json()["detail"] == "a setting holds a number that is not finite"


def test_a_failure_of_the_server_has_the_protocols_shape(served, monkeypatch):
    monkeypatch.setattr(type(served.drawer), "id", property(lambda self: 1 / 0))
    answer = httpx.get(served.url + "/health")
    assert (answer.status_code, answer.json().keys()) == (500, {"error"})


def test_options_that_cannot_be(served):
    answer = served.post("/sdapi/v1/options", json={"sd_model_checkpoint": "another"})
    assert answer.status_code == 422
    assert "'another'" in answer.json()["detail"]


def test_progress_and_interrupt(client, served):
    found = []
    wanted = {"prompt": "a cat", "steps": LONG, "batch_size": 2, "width": 16, "height": 16}
    asking = threading.Thread(target=lambda: found.append(served.post("/sdapi/v1/txt2img", json=wanted)))
    asking.start()
    served.wait_for(lambda drawer: drawer.current and drawer.current.step > 2)
    progress = client.get_progress()
    assert 0 < progress["progress"] < 0.5
    assert progress["state"]["sampling_steps"] == LONG
    assert progress["state"]["job_count"] == 2
    assert progress["eta_relative"] > 0
    client.interrupt()
    asking.join()
    assert found[0].status_code == 409
    assert "interrupted" in found[0].json()["detail"]
    client.interrupt()  # of nothing


def test_an_interrupted_order_gets_what_is_done(client, served):
    found = []
    asking = threading.Thread(
        target=lambda: found.append(client.txt2img(prompt="a cat", steps=60, batch_size=3, width=16, height=16, seed=1))
    )
    asking.start()
    served.wait_for(lambda drawer: drawer.current and drawer.current.number == 1 and drawer.current.step)
    client.interrupt()
    asking.join()
    assert len(found[0].images) == 1
    assert found[0].info["all_seeds"] == [1]
    assert json.loads(found[0].json["info"])["prompt"] == "a cat"
