"""What a client may not ask for, and what it is told."""

import math

import pytest

from edgellm.orchestrator.tokenizer import load_tokenizer
from edgellm.orchestrator.validation import InvalidRequestError, RequestReader
from edgellm.runtime.rpc.inference_pb2 import Chat, ChatMessage, GenerateRequest, SamplingParams, TokenIds


@pytest.fixture(scope="module")
def reader(bundle) -> RequestReader:
    return RequestReader(
        model=bundle.index.model,
        tokenizer=load_tokenizer(bundle.folder / "tokenizer"),
        new_request_id=lambda: "chosen",
        new_seed=lambda: 77,
    )


def sampling(**fields) -> GenerateRequest:
    return GenerateRequest(text="x", sampling=SamplingParams(**fields))


def chat(*messages: tuple[str, str]) -> GenerateRequest:
    return GenerateRequest(chat=Chat(messages=[ChatMessage(role=role, content=text) for role, text in messages]))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (GenerateRequest(), "the prompt is empty"),
        (GenerateRequest(text=""), "the prompt is empty"),
        (GenerateRequest(token_ids=TokenIds()), "the prompt is empty"),
        (chat(), "the prompt is empty"),
        (chat(("user", "")), "the prompt is empty"),
        (chat(("wizard", "hello")), "unknown role 'wizard'"),
        (GenerateRequest(text="x" * 2048), "the prompt has 2048 tokens, and the context of 2048 tokens"),
        (GenerateRequest(text="x" * 2000, max_tokens=49), "2000 prompt tokens \\+ max_tokens 49 = 2049 exceed"),
        (GenerateRequest(token_ids=TokenIds(ids=[1, 257])), "token id 257 is outside the vocabulary.*below 257"),
        (GenerateRequest(text="x", stop_token_ids=[300]), "stop token id 300 is outside"),
        (GenerateRequest(text="x", stop=[""]), "a stop string is empty"),
        (GenerateRequest(text="x", stop=["s"] * 17), "17 stop strings"),
        (GenerateRequest(text="x", stop=["s" * 257]), "a stop string has 257 characters: at most 256"),
        (GenerateRequest(text="x" * 10241), "10241 characters, and 10240 are the most that a context of 2048 tokens"),
        (chat(("user", "x" * 10000), ("user", "x" * 241)), "10241 characters, and 10240 are the most"),
        (GenerateRequest(text="x", model="gpt"), "model 'gpt' is not served here, 'toy' is"),
        (GenerateRequest(text="x", request_id="a\nb"), "request id 'a\\\\nb' must be printable"),
        (GenerateRequest(text="x", request_id="a" * 129), "at most 128 characters"),
        (sampling(temperature=-1.0), "temperature is -1"),
        (sampling(temperature=math.nan), "temperature is nan"),
        (sampling(temperature=math.inf), "temperature is inf"),
        (sampling(top_p=0.0), "top_p is 0"),
        (sampling(top_p=1.5), "top_p is 1.5"),
        (sampling(top_p=math.nan), "top_p is nan"),
        (sampling(min_p=-0.5), "min_p is -0.5"),
        (sampling(min_p=math.nan), "min_p is nan"),
        (sampling(repetition_penalty=0.0), "repetition_penalty is 0"),
        (sampling(repetition_penalty=-2.0), "repetition_penalty is -2"),
        (sampling(repetition_penalty=math.nan), "repetition_penalty is nan"),
        (sampling(logit_bias={3: math.nan}), "logit_bias of token 3 is nan"),
        (sampling(logit_bias={999: 1.0}), "logit_bias token id 999 is outside"),
    ],
)
def test_bad_requests_are_told_what_is_wrong(reader, request_, message):
    with pytest.raises(InvalidRequestError, match=message):
        reader.read(request_, now_s=0.0)


def test_everything_absent_is_resolved(reader):
    spec = reader.read(GenerateRequest(text="hello"), now_s=10.0)
    assert spec.request_id == "chosen"
    assert len(spec.prompt) == 5
    assert spec.generation.max_tokens == 2043
    assert spec.generation.sampling.seed == 77
    assert spec.generation.sampling.temperature == 0
    assert spec.generation.sampling.top_p == 1
    assert spec.generation.stop_token_ids == (256,)
    assert spec.deadline_s is None


def test_what_is_given_is_kept(reader):
    request = GenerateRequest(
        request_id="mine",
        model="toy",
        token_ids=TokenIds(ids=[1, 2]),
        sampling=SamplingParams(temperature=0.5, seed=0, top_p=0.5),
        stop_token_ids=[7],
        ignore_eos=True,
        deadline_ms=1500,
    )
    spec = reader.read(request, now_s=10.0)
    assert (spec.request_id, spec.prompt, spec.deadline_s) == ("mine", (1, 2), 11.5)
    assert (spec.generation.sampling.temperature, spec.generation.sampling.seed) == (0.5, 0)
    assert spec.generation.stop_token_ids == (7,)


def test_a_chat_goes_through_the_template(reader):
    spec = reader.read(chat(("system", "be brief"), ("user", "hi")), now_s=0.0)
    assert reader.tokenizer.decode(spec.prompt) == "system: be brief\nuser: hi\nassistant:"
