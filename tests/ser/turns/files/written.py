"""The same three turns as the tools of each format write them; written for these tests, copied from nowhere."""

__all__ = ["EAF", "FILES", "LONG_TEXTGRID", "SHORT_TEXTGRID", "TURNS", "eaf"]

from mal_adapter.ser.turns.turn import Turn

TURNS = [
    Turn(0.5, 2.25, "customer", text="Where is my parcel?"),
    Turn(2.0, 3.5, "agent", text="Let me see.", overlaps=True),
    Turn(4.0, 5.5, "customer", text="Thank you."),
]
TURNS[0] = Turn(0.5, 2.25, "customer", text="Where is my parcel?", overlaps=True)

LONG_TEXTGRID = """File type = "ooTextFile"
Object class = "TextGrid"

xmin = 0 
xmax = 6 
tiers? <exists> 
size = 2 
item []: 
    item [1]:
        class = "IntervalTier" 
        name = "customer" 
        xmin = 0 
        xmax = 6 
        intervals: size = 5 
        intervals [1]:
            xmin = 0 
            xmax = 0.5 
            text = "" 
        intervals [2]:
            xmin = 0.5 
            xmax = 2.25 
            text = "Where is my parcel?" 
        intervals [3]:
            xmin = 2.25 
            xmax = 4 
            text = "" 
        intervals [4]:
            xmin = 4 
            xmax = 5.5 
            text = "Thank you." 
        intervals [5]:
            xmin = 5.5 
            xmax = 6 
            text = "sil" 
    item [2]:
        class = "IntervalTier" 
        name = "agent" 
        xmin = 0 
        xmax = 6 
        intervals: size = 3 
        intervals [1]:
            xmin = 0 
            xmax = 2 
            text = "<SIL>" 
        intervals [2]:
            xmin = 2 
            xmax = 3.5 
            text = "Let me see." 
        intervals [3]:
            xmin = 3.5 
            xmax = 6 
            text = "" 
"""  # noqa: W291

SHORT_TEXTGRID = """File type = "ooTextFile"
Object class = "TextGrid"

0
6
<exists>
3
"IntervalTier"
"customer"
0
6
5
0
0.5
""
0.5
2.25
"Where is my parcel?"
2.25
4
""
4
5.5
"Thank you."
5.5
6
""
"IntervalTier"
"agent"
0
6
3
0
2
""
2
3.5
"Let me see."
3.5
6
""
"TextTier"
"beeps"
0
6
1
1.5
"beep"
"""


def eaf(tiers: str, slots: str, header: str = 'TIME_UNITS="milliseconds"', before: str = "") -> str:
    return f"""<?xml version="1.0" encoding="UTF-8"?>
{before}<ANNOTATION_DOCUMENT AUTHOR="" DATE="2024-05-01T10:00:00+01:00" FORMAT="3.0" VERSION="3.0"
    xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"
    xsi:noNamespaceSchemaLocation="http://www.mpi.nl/tools/elan/EAFv3.0.xsd">
    <HEADER MEDIA_FILE="" {header}>
        <MEDIA_DESCRIPTOR MEDIA_URL="file:///call.wav" MIME_TYPE="audio/x-wav"/>
        <PROPERTY NAME="lastUsedAnnotationId">5</PROPERTY>
    </HEADER>
    <TIME_ORDER>{slots}</TIME_ORDER>
    {tiers}
    <LINGUISTIC_TYPE GRAPHIC_REFERENCES="false" LINGUISTIC_TYPE_ID="default-lt" TIME_ALIGNABLE="true"/>
    <CONSTRAINT DESCRIPTION="1-1 association with a parent annotation" STEREOTYPE="Symbolic_Association"/>
</ANNOTATION_DOCUMENT>
"""


def aligned(number: int, first: int, last: int, text: str) -> str:
    return (
        f'<ANNOTATION><ALIGNABLE_ANNOTATION ANNOTATION_ID="a{number}" TIME_SLOT_REF1="ts{first}" '
        f'TIME_SLOT_REF2="ts{last}"><ANNOTATION_VALUE>{text}</ANNOTATION_VALUE></ALIGNABLE_ANNOTATION></ANNOTATION>'
    )


EAF = eaf(
    '<TIER LINGUISTIC_TYPE_REF="default-lt" PARTICIPANT="customer" TIER_ID="K-Spch">'
    + aligned(1, 1, 3, "Where is my parcel?")
    + aligned(2, 5, 6, "Thank you.")
    + '</TIER><TIER LINGUISTIC_TYPE_REF="default-lt" TIER_ID="agent">'
    + aligned(3, 2, 4, "Let me see.")
    + '</TIER><TIER LINGUISTIC_TYPE_REF="dep" PARENT_REF="agent" PARTICIPANT="agent" TIER_ID="translation">'
    '<ANNOTATION><REF_ANNOTATION ANNOTATION_ID="a4" ANNOTATION_REF="a3"><ANNOTATION_VALUE>Mal sehen.'
    "</ANNOTATION_VALUE></REF_ANNOTATION></ANNOTATION></TIER>"
    '<TIER LINGUISTIC_TYPE_REF="dep" PARENT_REF="translation" TIER_ID="note">'
    '<ANNOTATION><REF_ANNOTATION ANNOTATION_ID="a5" ANNOTATION_REF="a4"><ANNOTATION_VALUE>friendly'
    "</ANNOTATION_VALUE></REF_ANNOTATION></ANNOTATION></TIER>"
    '<TIER LINGUISTIC_TYPE_REF="default-lt" TIER_ID="empty"/>',
    "".join(
        f'<TIME_SLOT TIME_SLOT_ID="ts{number}" TIME_VALUE="{ms}"/>'
        for number, ms in enumerate((500, 2000, 2250, 3500, 4000, 5500), start=1)
    ),
)

#: Name of the file -> content. All have the three turns; RTTM and pyannote's lists have no texts.
FILES = {
    "pyannote.rttm": """SPEAKER call 1 0.500 1.750 <NA> <NA> customer <NA> <NA>
SPEAKER call 1 2.000 1.500 <NA> <NA> agent <NA> <NA>
SPEAKER call 1 4.000 1.500 <NA> <NA> customer <NA> <NA>
""",
    "nist.rttm": """;; made by a scoring tool
SPKR-INFO call 1 <NA> <NA> <NA> unknown customer <NA>
SPKR-INFO call 1 <NA> <NA> <NA> unknown agent <NA>
LEXEME call 1 0.5 0.25 where lex customer 0.9
SPEAKER call 1 4.0 1.5 <NA> <NA> customer 0.93
SPEAKER call 1 0.5 1.75 <NA> <NA> customer 0.91
SPEAKER call 1 2.0 1.5 <NA> <NA> agent 0.88
""",
    "long.TextGrid": LONG_TEXTGRID,
    "short.TextGrid": SHORT_TEXTGRID,
    "elan.eaf": EAF,
    "whisperx.srt": """1
00:00:00,500 --> 00:00:02,250
[customer]: Where is my parcel?

2
00:00:02,000 --> 00:00:03,500
[agent]: Let me see.

3
00:00:04,000 --> 00:00:05,500
[customer]: Thank you.

""",
    "colons.srt": """1
00:00:00,500 --> 00:00:02,250
customer: Where is
my parcel?

2
00:00:02,000 --> 00:00:03,500 X1:40 X2:600 Y1:20 Y2:50
<i>agent: Let me see.</i>

3
00:00:04,000 --> 00:00:05,500
{\\an8}customer: Thank you.
""",
    "teams.vtt": """WEBVTT - a meeting

NOTE
made by a meeting's recorder

STYLE
::cue(v[voice=agent]) { color: lime }

9f2a-1
00:00.500 --> 00:02.250 align:start
<v customer>Where is my
parcel?</v>

9f2a-2
00:00:02.000 --> 00:00:03.500
<v.loud.first agent>Let <00:00:02.500><c>me</c> see.

00:00:04.000 --> 00:00:05.500
<v customer>Thank&nbsp;you.</v>
""",
    "zoom.vtt": """WEBVTT

1
00:00:00.500 --> 00:00:02.250
customer: Where is my parcel?

2
00:00:02.000 --> 00:00:03.500
agent: Let me see.

3
00:00:04.000 --> 00:00:05.500
customer: Thank you.
""",
    "labels.txt": """0.500000\t2.250000\tcustomer: Where is my parcel?
\\\t120.000000\t4000.500000
1.500000\t1.500000\tbeep
2.000000\t3.500000\tagent: Let me see.
4.000000\t5.500000\tcustomer: Thank you.
""",
    "commas.csv": """speaker,start,end,text
customer,0.5,2.25,Where is my parcel?
agent,2.0,3.5,Let me see.
customer,4.0,5.5,"Thank you."
""",
    "semicolons.csv": """Sprecher;Speaker ID;Onset;Offset;Transcript
1;customer;0,5;2,25;Where is my parcel?
2;agent;2,0;3,5;Let me see.

1;customer;4,0;5,5;Thank you.
""",
    "elan export.tsv": """Tier\tBegin Time - hh:mm:ss.ms\tBegin Time - ss.msec\tDuration - msec\tTranscription
customer\t00:00:00.500\t0.5\t1750\tWhere is my parcel?
agent\t00:00:02.000\t2.0\t1500\tLet me see.
customer\t00:00:04.000\t4.0\t1500\tThank you.
""",
    "milliseconds.csv": """startTimeMs,endTimeMs,speakerName,text
500,2250,customer,Where is my parcel?
2000,3500,agent,Let me see.
4000,5500,customer,Thank you.
""",
    "whisperx.json": """{"segments": [
{"start": 0.5, "end": 2.25, "text": " Where is my parcel?", "speaker": "customer", "words": [
    {"word": "Where", "start": 0.5, "end": 0.75, "score": 0.9, "speaker": "customer"}, {"word": "2"}]},
{"start": 2.0, "end": 3.5, "text": " Let me see.", "speaker": "agent", "words": []},
{"start": 4.0, "end": 5.5, "text": " Thank you.", "speaker": "customer", "avg_logprob": -0.2},
{"start": 6.0, "end": 6.0, "text": ""}],
"word_segments": [{"word": "Where", "start": 0.5, "end": 0.75, "speaker": "customer"}], "language": "en"}""",
    "whisperx.aud": """0.5\t2.25\t[[customer]]Where is my parcel?
2.0\t3.5\t[[agent]]Let me see.
4.0\t5.5\t[[customer]]Thank you.
""",
    "pyannote.json": """{"diarization": [{"start": 0.5, "end": 2.25, "speaker": "customer"},
{"start": 2.0, "end": 3.5, "speaker": "agent"}, {"start": 4.0, "end": 5.5, "speaker": "customer"}],
"exclusive_diarization": [{"start": 0.5, "end": 2.25, "speaker": "customer"},
{"start": 2.25, "end": 3.5, "speaker": "agent"}, {"start": 4.0, "end": 5.5, "speaker": "customer"}]}""",
    "job.json": """{"jobId": "3c8a89a5", "status": "succeeded", "createdAt": "2024-05-01T10:00:00Z", "output": {
"exclusiveDiarization": [{"speaker": "customer", "start": 0.5, "end": 2.25}],
"diarization": [{"speaker": "customer", "start": 0.5, "end": 2.25}, {"speaker": "agent", "start": 2.0, "end": 3.5},
{"speaker": "customer", "start": 4.0, "end": 5.5}], "wordLevelTranscription": []}}""",
    "list.json": """[{"speaker": "customer", "start": 0.5, "end": 2.25}, {"speaker": "agent", "start": 2, "end": 3.5},
{"speaker": "customer", "start": 4.0, "end": 5.5}]""",
    "annotation.json": """{"pyannote": "Annotation", "content": [
{"segment": {"start": 0.5, "end": 2.25}, "track": "A", "label": "customer"},
{"segment": {"start": 2.0, "end": 3.5}, "track": "B", "label": "agent"},
{"segment": {"start": 4.0, "end": 5.5}, "track": "C", "label": "customer"}]}""",
    "nemo.jsonl": """{"audio_filepath": "call.wav", "offset": 0.5, "duration": 1.75, "speaker": "customer"}
{"audio_filepath": "call.wav", "offset": 2.0, "duration": 1.5, "speaker": "agent"}

{"audio_filepath": "call.wav", "offset": 4.0, "duration": 1.5, "speaker": "customer"}
""",
}
