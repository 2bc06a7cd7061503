"""The rule for conversations that describe an image, and the drawing samples made of them."""

import pytest

from llava_ext.data.descriptions import asks_for_description, is_chosen, is_description
from llava_ext.data.records import RowOptions, parse_row

DESCRIBING = """
Describe the image concisely.
Provide a brief description of the given image.
Offer a succinct explanation of the picture presented.
Summarize the visual content of the image.
Give a short and clear explanation of the subsequent image.
Share a concise interpretation of the image provided.
Present a compact description of the photo's key features.
Present a compact description of the photo’s key features.
Relay a brief, clear account of the picture shown.
Render a clear and concise summary of the photo.
Write a terse but informative summary of the picture.
Create a compact narrative representing the image presented.
What is in the photo?
What is this?
Give a brief description of the image.
What is this photo about'?
What's happening in the scene?
What do you see happening in this image?
What do you think is going on in this snapshot?
Can you elaborate on the elements of the picture provided?
Describe the following image.
Write a detailed description of the given image.
Explain the visual content of the image in great detail.
Analyze the image in a comprehensive and detailed manner.
Can you describe the main features of this image for me?
What are the key elements in this picture?
Describe the following image in detail
Give an elaborate explanation of the image you see
Share a comprehensive rundown of the presented image
Offer a thorough analysis of the image
Explain the various aspects of the image before you
Clarify the contents of the displayed image with great detail
Characterize the image using a well-detailed description
Break down the elements of the image in a detailed manner
Walk through the important details of the image
Portray the image with a rich, descriptive narrative
Narrate the contents of the image with precision
Illustrate the image through a descriptive explanation
Examine the image closely and share its details
Write an exhaustive depiction of the given image
Please describe this image as detailed as possible
Provide a one-sentence caption for the provided image.
Please enlighten me with a detailed description of the image.
Describe this picture for me
What does this image show?
What is shown in this image?
""".strip().splitlines()
OTHER = """
What is the color of the car in the image?
What is this person doing?
Please provide a short description for this region: [0.47, 0.1, 0.9, 0.96].
Describe the man on the left of the picture.
How many dogs are in the image?
Is this photo taken indoors?
Why is this picture funny?
Who is in this picture?
Describe the image in the form of a poem.
Answer the question using a single word or phrase.
What is the title of this book?
Where was this photo taken?
What are the key elements of marketing?
Describe the history of photography.
Convert this image to HTML code.
What does the sign in the image say?
Explain why the image is blurred.
Provide the bounding box coordinate of the region this sentence describes: man in red.
""".strip().splitlines()


def turns(question, answer):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def records_of(question, answer, share=1.0, **fields):
    row = {"id": "a", "image": "data:;base64,aGVsbG8=", "conversations": turns(question, answer), **fields}
    return parse_row(row, RowOptions(draw_share=share))


@pytest.mark.parametrize("instruction", DESCRIBING)
def test_an_instruction_that_asks_for_a_description_is_recognized(instruction):
    assert asks_for_description(instruction) and asks_for_description(instruction.upper())


@pytest.mark.parametrize("instruction", OTHER)
def test_other_questions_are_not_descriptions(instruction):
    assert not asks_for_description(instruction)


def test_a_description_gives_a_record_that_reads_and_one_that_draws():
    read, drawn = records_of("<image>\nDescribe the image concisely.", "a red disc")
    assert read.kind == "read" and not read.is_from_description
    assert drawn.kind == "draw" and drawn.is_from_description and drawn.images == read.images
    assert [(m["role"], m["content"]) for m in drawn.messages] == [("user", "a red disc"), ("assistant", "<image>")]


def test_a_plain_pair_of_image_and_text_is_a_description():
    assert len(records_of("<image>", "a red disc")) == 2


def test_the_list_of_ocr_tokens_of_textcaps_is_disregarded():
    question = "<image>\nProvide a one-sentence caption for the provided image.\nReference OCR token: 12, man, left"
    assert len(records_of(question, "A man on the left of a 12.")) == 2


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("<image>\nDescribe the image.", "disc"),
        ("<image>\nDescribe the image.", "[0.1, 0.2, 0.3, 0.4] a disc"),
        ("<image>\nHow many discs?", "there are three discs"),
    ],
)
def test_other_conversations_give_one_record(question, answer):
    assert len(records_of(question, answer)) == 1


def test_a_literal_image_tag_in_a_description_stays_literal():
    drawn = records_of("<image>\nDescribe the image.", "a page about \\<image> tags")[1]
    assert drawn.messages[0]["content"] == "a page about \\<image> tags" and drawn.drawn == (True,)


def test_conversations_of_several_turns_or_images_are_not_descriptions():
    first = [{"role": "user", "content": "<image>\nDescribe the image."}, {"role": "assistant", "content": "a disc"}]
    assert is_description(first) and is_description([{"role": "system", "content": "Be brief."}, *first])
    assert not is_description(first * 2)
    assert not is_description([{**first[0], "content": "<image><image>\nDescribe the image."}, first[1]])
    assert not is_description([first[0], {**first[1], "content": "a disc <image>"}])


def test_the_share_is_met_and_a_larger_one_contains_a_smaller_one():
    chosen = {share: {n for n in range(2000) if is_chosen(f"text {n}", f"{n}.jpg", share)} for share in (0.0, 0.3, 1.0)}
    assert not chosen[0.0] and len(chosen[1.0]) == 2000 and chosen[0.3] < chosen[1.0]
    assert 540 < len(chosen[0.3]) < 660
    assert len(records_of("<image>\nDescribe the image.", "a red disc", share=0.0)) == 1
