r"""The phrases that announce an answer, from other languages to English.

    >>> in_english("所以面积是12平方厘米。")
    '所以面积 is 12 平方厘米. '

Not a translation: only what stands around a number, a formula or a letter is replaced, so that the search for a final
answer (`extraction.py`) has to know one language. Plain string work on the end of a text.
"""

import re
from functools import lru_cache

_END = 1000
"""Characters at the end that are read."""
_PUNCTUATION = str.maketrans(
    {chr(0xFF01 + code): chr(0x21 + code) for code in range(94)}  # full-width ASCII
    | {"。": ". ", "｡": ". ", "।": ". ", "؟": "? ", "、": ", ", "،": ", ", "؛": "; ", "\u3000": " "}
    | {"！": "! ", "？": "? ", "，": ", ", "：": ": ", "．": ". "}
)
_VALUE = r"(?=[-−+]?[$\\(]*[-−+]?(?:\d|\$|\\)|\(?[A-J]\b)"
"""A number, formula or letter follows."""
_THING = r"[-−+]?(?:\$[^$\n]{1,80}\$|\([A-J]\)|[A-J]\b|\d[\d.,/]*)"
_AND_OR = r"(?<=[\dA-J)$])\s*,?\s*(?:%s)\s*(?=[-−+$\\(]*(?:\d|[A-J]\b))"
"""One of these words between two values."""
_SO = r"(?:^|(?<=[.!?\n]))\s*(?:%s)\s*[,:]?\s*"
"""One of these words at the beginning of a sentence."""
_LATIN = re.compile(r"(?<=[^\W\d_A-Za-zÀ-ɏ])(?=[A-Za-z\d$\\(])|(?<=[A-Za-z\d)$])(?=[^\W\d_A-Za-zÀ-ɏ])")
"""Where another script and Latin letters or digits touch."""


def _language(
    spoken: str, so: str, either: str, both: str, because: str, *rules: tuple[str, str]
) -> tuple[str, list[tuple[re.Pattern[str], str]]]:
    """`spoken`: of a language in its own script a range of letters; of another its most frequent words where an answer
    is given. The words for "so", "or", "and" and "because" stand around the rules of its own."""
    ends = [(_AND_OR % either, " or "), (_AND_OR % both, " and "), (rf",?\s*(?:{because})", ", because ")]
    all_rules = [(_SO % so, "so "), *rules, *ends]
    return spoken, [(re.compile(pattern, re.IGNORECASE), replacement) for pattern, replacement in all_rules]


_LANGUAGES = [
    _language(  # Chinese
        "[\u4e00-\u9fff]",
        *("所以|因此|故|综上所?述?|那么|于是|从而|解得", "或者?|还是", "和|与|及", "因为|由于"),
        (r"【(?:答案|解答)】\s*", " answer is "),
        (rf"({_THING})(?<![.,])\s*不", r" answer is not \1"),
        (r"(?:[大小多少高低]于|超过|不足|[至最][多少])(?:有|是|为)?", " greater than "),
        (rf"({_THING})\s*[^\s\d,.]?(?:以[上下内]|多[^\s\d])", r" greater than \1"),
        (r"(?:答案|结果|选项)?(?:并?不|并非|没)[^\s\d,.A-J]{0,6}?\s*" + _VALUE, " answer is not "),
        (r"(?:答案|结果|选项|正解|解答|回答)(?:应该?|就|应当)?(?:是|为|等于|选择?|[:=])\s*(?:选项)?", " answer is "),
        (r"(?:^|(?<=[\n.,]))\s*答\s*:", " answer is "),
        (r"(?<!不)选(?:择|项)?(?:是|为|:)?\s*" + _VALUE + r"(?=\s*\(?[A-J]\b)", " answer is "),
        (r"(?<=[A-J])\s*(?:选项|项)(?!\w)", ""),
        (r"(?:是|为|等于|得到?|有|共|剩下?)\s*:?\s*" + _VALUE, " is "),
        (_AND_OR % "到|至|~", " to "),
    ),
    _language(  # Japanese
        "[\u3040-\u30ff]",
        *("したがって|よって|ゆえに|従って", "または|もしくは|か", "と|および", "なぜなら"),
        (rf"({_THING})\s*[^\s\d,.]{{0,4}}?(?:より|以上|以下|未満)", r" greater than \1"),
        (rf"(?:は\s*)?({_THING})[^\s.,]{{0,8}}?\s*(?:では|じゃ)(?:ない|ありません)", r" answer is not \1"),
        (r"(?:答え|答|解答|回答|正解|結果|選択肢)\s*(?:は|:)\s*(?:選択肢)?", " answer is "),
        (r"は\s*" + _VALUE, " is "),
        (r"\s*(?:です|である|だ|でした|[とに]な(?:る|ります))(?=\s*(?:[.,!]|$))", ""),
    ),
    _language(  # Arabic
        "[\u0600-\u06ff]",
        *("إذن|إذًا|وبالتالي|لذلك", "أو", "و", "لأن"),
        (r"على (?:الأقل|الأكثر)|(?:أكبر|أصغر|أقل|أكثر) من", " greater than "),
        (r"(?:ليست?|لا [تي]ساوي)\s*", " answer is not "),
        (
            r"(?:الإجابة|الاجابة|الجواب|الناتج|النتيجة|الخيار)(?:\s+(?:النهائية?|الصحيحة?))*\s*(?:هي|هو|[:=])\s*(?:الخيار)?",
            " answer is ",
        ),
        (r"\b(?:[تي]ساوي|هي|هو)\s*" + _VALUE, " is "),
    ),
    _language(  # Hindi
        "[\u0900-\u097f]",
        *("इसलिए|अतः|इस प्रकार", "या", "और", "क्योंकि"),
        (rf"({_THING}) से (?:अधिक|कम|बड़ा|छोटा|ज़्यादा)|कम से कम", r" greater than \1"),
        (rf"({_THING})\s*(?:सही\s*)?नहीं", r" answer is not \1"),
        (r"(?:उत्तर|जवाब|विकल्प)\s*[:=]?\s*(?:विकल्प\s*)?" + f"(?:{_VALUE}|(?=answer))", " answer is "),
        (r"(?<=[A-J])\s*सही(?=\s*है)|\s*(?:हैं|है|होगा|होगी)(?=\s*(?:[.,!]|$))", ""),
    ),
    _language(
        "réponse résultat est sont vaut égale le les il moins",
        *("donc|ainsi|par conséquent|finalement", "ou", "et", r"\b(?:car|parce qu|puisqu)"),
        (r"\b(?:(?:supé|infé)rieure?s? à|(?:plus|moins) (?:grande? )?(?:que|de)|au (?:moins|plus))\b", "greater than"),
        (r"\b(?:réponse|résultat)?(?: \w+)? (?:n['’]est|ne vaut) pas\b", " answer is not "),
        (
            r"\b(?:réponse|résultat|option|choix)(?: (?:finale?|correcte?|exacte?))?\s*(?:est|:)"
            r"(?:\s*donc)?\s*:?(?:\s*(?:la réponse|l['’]option)\b)?",
            "answer is ",
        ),
        (r"\b(?:est|sont|vaut|valent)(?:\s+(?:donc|de|égale?s? à))*\s+" + _VALUE, "is "),
        (r",\s*(?:et )?(?:non|pas)\b", ", not"),
    ),
    _language(
        "antwort ergebnis lösung beträgt ist sind gleich der die das es weniger",
        *("also|somit|daher|folglich", "oder", "und", r"(?<=,)\s*(?:weil|denn|da)\b"),
        (r"\b(?:größer|kleiner|mehr|weniger|höchstens|mindestens)(?: als)?\b", "greater than"),
        (
            r"\b(?:Antwort|Ergebnis|Lösung)?\s*(?:ist|lautet|beträgt) (?:also )?(?:nicht|kein\w*)(?: gleich)?\b",
            " answer is not ",
        ),
        (
            r"\b(?:Antwort|Endergebnis|Ergebnis|Lösung|Option)\s*(?:(?:ist|lautet|beträgt)\b|:)"
            r"(?:\s*(?:also|daher|somit)\b)?\s*:?(?:\s*Option\b)?",
            "answer is ",
        ),
        (r"\b(?:(?:ist|sind|beträgt|betragen)(?:\s+(?:also|daher|die Fläche|gleich))*|gleich)\s+" + _VALUE, "is "),
        (_AND_OR % "bis", " to "),
        (r",\s*(?:und )?nicht\b", ", not"),
    ),
    _language(
        "respuesta resultado solución opción es hay el los menos",
        *("por (?:lo )?tanto|entonces|así", "o|u", "y", r"\b(?:porque|ya que|pues|puesto que)\b"),
        (r"\b(?:mayor|menor|más|menos)(?: que| de)\b|\bal menos\b|\bcomo (?:máximo|mínimo)\b", "greater than"),
        (
            r"(?:\b(?:respuesta|resultado|solución|opción)(?: \w+)? )?\bno (?:es|son)\b|\bno \w+ " + _VALUE,
            " answer is not ",
        ),
        (
            r"\b(?:respuesta|resultado|solución|opción|alternativa)(?: (?:final|correct[ao]|exact[ao]))?"
            r"\s*(?:es\b|:)\s*:?(?:\s*(?:la )?opción\b|\s*la\b)?",
            "answer is ",
        ),
        (r"\b(?:es|son)(?:\s+(?:igual a|de))?\s+" + _VALUE, "is "),
        (r",\s*(?:y )?no\b", ", not"),
    ),
]

YES_NO = {
    **dict.fromkeys(["是", "是的", "对", "正确", "oui", "ja", "sí", "si", "はい", "نعم", "हाँ", "हां"], "yes"),
    **dict.fromkeys(["否", "不是", "不", "non", "nein", "いいえ", "لا", "नहीं"], "no"),
}


def in_english(text: str) -> str:
    """The text with its last phrases in English; as it is if it holds none of another language."""
    return text[:-_END] + _end_in_english(text[-_END:])


@lru_cache(maxsize=64)
def _end_in_english(end: str) -> str:
    if foreign := not end.isascii():
        end = _LATIN.sub(" ", end.translate(_PUNCTUATION))
    words = set(re.split(r"[^\w]+", end.lower()))
    for spoken, rules in _LANGUAGES:
        if re.search(spoken, end) if spoken[0] == "[" and foreign else not words.isdisjoint(spoken.split()):
            for pattern, replacement in rules:
                end = pattern.sub(replacement, end)
    return end
