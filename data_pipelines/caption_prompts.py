"""What a captioner is asked. `--prompt=NAME` picks one; any other text is taken as the prompt itself."""

PROMPTS = {
    "video": (
        "These are frames of one video in order of time. Describe the video in one paragraph of at most six sentences: "
        "the subjects and what they look like, how they move and change, the place, the light, the style and how the "
        "camera moves. State what is visible as fact. Do not mention frames or images, and do not guess."
    ),
    "short": "These are frames of one video in order of time. Say in one sentence what happens in it.",
    "image": "Describe the picture in one paragraph of at most four sentences: subject, setting, light and style.",
    "template": (
        "These are frames of one video in order of time. Describe it under these headings, one line each: Subject, "
        "Motion, Scene, Atmosphere, Light, Camera. Leave out what cannot be seen."
    ),
    "objects": "List the objects visible in this video as comma-separated nouns and nothing else.",
    "actions": "List the actions visible in this video as comma-separated verbs and nothing else.",
}
