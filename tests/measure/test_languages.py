"""Languages of short texts: Article 1 of the Universal Declaration of Human Rights, and everyday sentences."""

# ruff: noqa: E501
from __future__ import annotations

import gzip
import json

import pytest

from llama2cli.measure.languages import LANGUAGES, RUN, WORDS, language_of, script_share

DECLARATION = {
    "en": "All human beings are born free and equal in dignity and rights. They are endowed with reason and conscience "
    "and should act towards one another in a spirit of brotherhood.",
    "fr": "Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués de raison et de "
    "conscience et doivent agir les uns envers les autres dans un esprit de fraternité.",
    "de": "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen begabt "
    "und sollen einander im Geiste der Brüderlichkeit begegnen.",
    "es": "Todos los seres humanos nacen libres e iguales en dignidad y derechos y, dotados como están de razón y "
    "conciencia, deben comportarse fraternalmente los unos con los otros.",
    "it": "Tutti gli esseri umani nascono liberi ed eguali in dignità e diritti. Essi sono dotati di ragione e di "
    "coscienza e devono agire gli uni verso gli altri in spirito di fratellanza.",
    "pt": "Todos os seres humanos nascem livres e iguais em dignidade e em direitos. Dotados de razão e de consciência, "
    "devem agir uns para com os outros em espírito de fraternidade.",
    "nl": "Alle mensen worden vrij en gelijk in waardigheid en rechten geboren. Zij zijn begiftigd met verstand en "
    "geweten, en behoren zich jegens elkander in een geest van broederschap te gedragen.",
    "sv": "Alla människor är födda fria och lika i värde och rättigheter. De är utrustade med förnuft och samvete och "
    "bör handla gentemot varandra i en anda av broderskap.",
    "da": "Alle mennesker er født frie og lige i værdighed og rettigheder. De er udstyret med fornuft og samvittighed, "
    "og de bør handle mod hverandre i en broderskabets ånd.",
    "pl": "Wszyscy ludzie rodzą się wolni i równi pod względem swej godności i swych praw. Są oni obdarzeni rozumem i "
    "sumieniem i powinni postępować wobec innych w duchu braterstwa.",
    "ro": "Toate ființele umane se nasc libere și egale în demnitate și în drepturi. Ele sunt înzestrate cu rațiune și "
    "conștiință și trebuie să se comporte unele față de altele în spiritul fraternității.",
    "ca": "Tots els éssers humans neixen lliures i iguals en dignitat i en drets. Són dotats de raó i de consciència, i "
    "han de comportar-se fraternalment els uns amb els altres.",
    "tr": "Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar. Akıl ve vicdana sahiptirler ve birbirlerine "
    "karşı kardeşlik zihniyeti ile hareket etmelidirler.",
    "ru": "Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом и совестью и "
    "должны поступать в отношении друг друга в духе братства.",
    "uk": "Всі люди народжуються вільними і рівними у своїй гідності та правах. Вони наділені розумом і совістю і "
    "повинні діяти у відношенні один до одного в дусі братерства.",
    "bg": "Всички хора се раждат свободни и равни по достойнство и права. Те са надарени с разум и съвест и следва да "
    "се отнасят помежду си в дух на братство.",
    "el": "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα.",
    "he": "כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם.",
    "ko": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
    "th": "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ",
    "ja": "すべての人間は、生れながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "zh": "人人生而自由,在尊严和权利上一律平等。他们赋有理性和良心,并应以兄弟关系的精神相对待。",
}
SPOKEN = [
    ("en", "Sure! Here are three things you can do when it rains: read a book, bake a cake, or call a friend."),
    ("en", "I'm sorry, but I don't know the answer to that."),
    ("en", "The café on the Rue de la Paix is lovely, and the croissants are the best in Paris."),
    (
        "fr",
        "Bien sûr ! Voici trois idées pour une journée de pluie : lire un livre, faire un gâteau ou appeler un ami.",
    ),
    ("fr", "Je ne sais pas."),
    ("fr", "Oui, merci !"),
    ("fr", "J’aime beaucoup Shakespeare, car c’est l’auteur de Hamlet."),
    ("de", "Ich weiß es leider nicht, aber du kannst in der Bibliothek nachfragen."),
    ("de", "Ja, gerne!"),
    ("es", "No lo sé, pero puedes preguntar en la biblioteca."),
    ("es", "¡Hola! ¿Cómo estás? Me gusta mucho el chocolate."),
    ("it", "Non lo so, ma puoi chiedere in biblioteca."),
    ("pt", "Não sei, mas você pode perguntar na biblioteca."),
    ("nl", "Ik weet het niet, maar je kunt het in de bibliotheek vragen."),
    ("ru", "Привет! Я не знаю, но ты можешь спросить в библиотеке."),
    ("uk", "Я не знаю, але ви можете запитати в бібліотеці."),
    ("ja", "はい、東京はとても大きい都市です。"),
    ("zh", "你好!我很高兴认识你。"),
]


@pytest.mark.parametrize("name", DECLARATION)
def test_each_language_is_told(name):
    assert language_of(DECLARATION[name]) == name
    assert language_of(DECLARATION[name].upper().lower()) == name
    assert set(DECLARATION) == set(LANGUAGES)


@pytest.mark.parametrize(("name", "text"), SPOKEN)
def test_everyday_sentences(name, text):
    assert language_of(text) == name


@pytest.mark.parametrize(
    "text",
    [
        "",
        "42",
        "😀 🎉",
        "Napoleon Bonaparte",
        "Semua orang dilahirkan merdeka dan mempunyai martabat dan hak-hak yang sama.",  # Indonesian
        "Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền.",  # Vietnamese
        "Kaikki ihmiset syntyvät vapaina ja tasavertaisina arvoltaan ja oikeuksiltaan.",  # Finnish
        "Minden emberi lény szabadon születik és egyenlő méltósága és joga van.",  # Hungarian
    ],
)
def test_what_cannot_be_told_is_none(text):
    assert language_of(text) is None


def test_what_most_words_are_decides():
    assert language_of("Sure! In French: " + DECLARATION["fr"]) == "fr"
    assert language_of(DECLARATION["en"] + " Bonjour, merci !") == "en"


def test_a_composed_letter_is_the_same_as_its_parts():
    assert language_of("Tu e\u0301tais la\u0300, et moi aussi, mais ou\u0300 est-il ?") == "fr"


def test_the_lists():
    for name, words in WORDS.items():
        assert len(words.split()) == len(set(words.split())), name
        assert words == words.lower()


def test_scripts():
    assert script_share("abc абв", "latin") == script_share("abc абв", "cyrillic") == 0.5
    assert script_share("123 !", "latin") == 0
    assert script_share("ﾃｽﾄ テスト てすと", "kana") == 1 and script_share("漢字 2026", "han") == 1
    assert script_share("नमस्ते", "devanagari") == 1 and script_share("Ωmega", "greek") == 0.2


def test_english_answers_of_openassistant(shared_data):
    """Label of people: the trees say "lang": "en" of each message."""

    def walk(node):
        yield node
        for reply in node.get("replies", []):
            yield from walk(reply)

    told = []
    trees = gzip.decompress((shared_data / "oasst_trees" / "en_100_tree.jsonl.gz").read_bytes())
    for line in trees.decode().splitlines():
        for node in walk(json.loads(line)["prompt"]):
            if node["role"] == "assistant" and len(RUN.findall(node["text"])) > 3:
                assert node["lang"] == "en"
                told.append(language_of(node["text"]))
    assert len(told) > 600 and told.count("en") / len(told) > 0.98
