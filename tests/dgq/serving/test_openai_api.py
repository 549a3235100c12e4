"""OpenAI's own client against the server."""

import base64
import io
import json

import openai
import pytest
from PIL import Image

from dgq.pictures.generation import Settings, generate
from dgq.pictures.pipelines import find_model


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="unused", max_retries=0)


def test_the_pictures_of_a_seed_are_those_of_generate(client, tiny_checkpoint, tiny_pipe):
    extra = {"seed": 5, "steps": 2, "guidance": 2.5, "negative_prompt": "a dog"}
    answer = client.images.generate(prompt="a cat", n=2, size="16x24", extra_body=extra)
    found = find_model(tiny_checkpoint)
    settings = Settings(2, 2.5, "a dog", 16, 24, 5)
    wanted = generate(tiny_pipe, ["a cat"] * 2, settings, label=found.label, name=found.base)
    assert [base64.b64decode(one.b64_json) for one in answer.data] == [picture.png() for picture in wanted]
    assert [one.seed for one in answer.data] == [5, 6]
    (other,) = client.images.generate(prompt="a cat", size="16x24", extra_body={**extra, "sampler": "euler a"}).data
    assert "Sampler: Euler a, " in Image.open(io.BytesIO(base64.b64decode(other.b64_json))).text["parameters"]
    assert answer.size == "16x24"
    assert Image.open(io.BytesIO(wanted[0].png())).text["parameters"].startswith("a cat\nNegative prompt: a dog\nSteps")


def test_what_is_left_out_is_the_models_choice(client, served, tiny_checkpoint):
    answer = client.images.generate(prompt="a cat", model=tiny_checkpoint.name, response_format="b64_json")
    text = Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json))).text["parameters"]
    settings = served.drawer.settings
    assert f"Steps: {settings.steps}, " in text
    assert f"Seed: {answer.data[0].seed}, Size: 16x16" in text


def test_the_model_is_listed(client, tiny_checkpoint):
    assert [model.id for model in client.models.list()] == [tiny_checkpoint.name]
    assert client.models.retrieve(tiny_checkpoint.name).owned_by == "dgq"
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.models.retrieve("dall-e-3")


@pytest.mark.parametrize(
    "wanted, status, message",
    [
        ({"prompt": ""}, 400, "the prompt is empty"),
        ({"prompt": "cat " * 40}, 400, "tokens, the model reads"),
        ({"prompt": "a \ud800"}, 400, "at character 3"),
        ({"prompt": None}, 400, "prompt: "),
        ({"sampler": "Euler b"}, 400, "the sampler 'Euler b' is not there"),
        ({"n": 0}, 400, "0 pictures are out of range"),
        ({"n": 11}, 400, "11 pictures are out of range"),
        ({"n": "many"}, 400, "n: "),
        ({"n": True}, 400, "n: true and false are no numbers"),
        ({"guidance": False}, 400, "guidance: true and false are no numbers"),
        ({"size": "17x16"}, 400, "multiple of"),
        ({"size": "2048x2048"}, 400, "over 1024 pixels"),
        ({"size": "large"}, 400, "neither N nor WIDTHxHEIGHT"),
        ({"size": "٦٤"}, 400, "neither N nor WIDTHxHEIGHT"),
        ({"steps": 0}, 400, "steps 0 is out of range"),
        ({"seed": -1}, 400, "seed -1 is out of range"),
        ({"seed": 2**63}, 400, "out of range"),
        ({"seed": 2**63 - 1, "n": 2}, 400, "seed 9223372036854775807 is out of range"),
        ({"guidance": 101}, 400, "guidance 101.0 is out of range"),
        ({"negative_prompt": "\0"}, 400, "negative prompt"),
        ({"negative_prompt": "cat " * 40}, 400, "the negative prompt has 42 tokens"),
        ({"response_format": "url"}, 400, "response_format: "),
        ({"quality": "hd"}, 400, "quality: "),
        ({"stream": True}, 400, "stream: "),
        ({"step": 3}, 400, "step: is not known here"),
        ({"model": "dall-e-3"}, 404, "not served here"),
    ],
    ids=repr,
)
def test_wrong_requests_are_told_in_the_protocols_shape(served, wanted, status, message):
    # not by the client: it checks, or encodes, some of them itself
    body = json.dumps({"prompt": "a cat", "steps": 1, **wanted})
    answer = served.post("/v1/images/generations", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert message in error["message"]
    assert len(error["message"]) < 600


@pytest.mark.parametrize("body", ["", "{", "[]", "3", "[" * 60000, '{"seed": ' + "9" * 5000 + "}", '{"guidance": NaN}'])
def test_what_is_no_request_is_told_so(served, body):
    answer = served.post("/v1/images/generations", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_picture_that_fails_is_told_and_the_next_one_drawn(served, damaged_vae):
    wanted = {"prompt": "a cat", "steps": 1}
    answer = served.post("/v1/images/generations", json=wanted)
    assert answer.status_code == 500
    assert "the decoder's picture is not finite" in answer.json()["error"]["message"]
    assert not served.drawer._jobs


def test_after_a_failure(served):
    assert served.post("/v1/images/generations", json={"prompt": "a cat", "steps": 1}).status_code == 200
