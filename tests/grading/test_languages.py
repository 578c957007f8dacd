r"""Unboxed answers in the phrases of several languages, and units as they are written there."""

import pytest

from mm_agrae.grading.accuracy import verify
from mm_agrae.grading.extraction import PLACES

# gold answer | completion
CORRECT = r"""
12 | 面积是12。
12 | 答案为 12。
12 | 答案：12
12 | 答：一共有12个苹果。
12 | 所以，这个三角形的面积等于12平方厘米。
12 | 因此答案是 $12$。
12 | 综上所述，最终答案是：12。
12 | 故答案为：12.
12 | 经过计算，我们得到的结果是１２。
12平方厘米 | 12
12平方厘米 | \boxed{12\text{ cm}^2}
12 cm^2 | 所以面积是12平方厘米。
12 | \boxed{12平方厘米}
12 | \boxed{12\text{个}}
3.5 | 所以边长是3.5米。
5米 | \boxed{500厘米}
60 km/h | 速度是60千米/小时。
60 km/h | 速度为60千米每小时。
120 | 所以这个角是120度。
\frac{1}{2} | 答案是 $\frac{1}{2}$，因为两者相等。
B | 故选：B
B | 故选B。
B | 故选：B．
B | 正确选项是（B）
B | 正确选项是（B）。
B | 所以正确答案是选项B。
B | 答案选Ｂ。
B | 因此选择B选项。
B | 由图可知，应选（B）。
yes | 是
no | 否
12 | La réponse est 12.
12 | La réponse finale est donc : 12
12 | Réponse : $12$
12 | Le résultat est 12 cm.
12 | L'aire du triangle est égale à 12 cm².
12 | Par conséquent, l'aire du triangle rectangle vaut $12$.
3.5 | La longueur est de 3,5.
B | La bonne réponse est B.
B | La bonne réponse est la réponse B.
B | La réponse correcte est (B), car les angles sont égaux.
yes | Oui
12 | Die Antwort ist 12.
12 | Die Antwort lautet 12.
12 | Antwort: 12
12 | Das Ergebnis ist also $12$.
12 | Die Lösung lautet: 12
12 | Der Flächeninhalt des Dreiecks beträgt 12 cm².
12 | Somit ist die Fläche gleich 12 Quadratzentimeter.
3.5 | Die Länge beträgt 3,5.
B | Die richtige Antwort ist B.
B | Die richtige Antwort ist (B), weil die Winkel gleich sind.
B | Die korrekte Option ist B.
no | Nein
12 | La respuesta es 12.
12 | La respuesta final es: 12
12 | Respuesta: $12$
12 | Por lo tanto, el resultado es 12.
12 | El área del triángulo es igual a 12 cm².
12 | La solución es 12, porque los ángulos son iguales.
B | La respuesta correcta es B.
B | La opción correcta es la B.
B | La respuesta correcta es la opción (B).
yes | Sí
12 | 答えは12です。
12 | 答え：12
12 | したがって、答えは $12$ です。
12 | 三角形の面積は12である。
12 | よって、面積は12平方センチメートルになります。
12 | 答えは12となります。
12 | 解答：１２
12 | 正解は12個です。
B | 正解はBです。
B | 正しい選択肢は（B）です。
B | 答えは選択肢Bです。
yes | はい
12 | الإجابة هي 12.
12 | الجواب النهائي هو 12.
12 | الإجابة: 12
12 | الجواب هو ١٢.
12 | إذن مساحة المثلث تساوي 12.
12 | وبالتالي فإن الناتج هو $12$.
3.5 | الإجابة هي ٣٫٥
B | الإجابة الصحيحة هي (B).
B | الإجابة الصحيحة هي الخيار B، لأن الزاويتين متساويتان.
yes | نعم
12 | उत्तर 12 है।
12 | उत्तर: 12
12 | सही उत्तर १२ है।
12 | अतः अंतिम उत्तर $12$ है।
12 | इसलिए त्रिभुज का क्षेत्रफल 12 है।
B | सही विकल्प B है।
B | सही उत्तर (B) है।
B | अतः सही उत्तर विकल्प B है, क्योंकि कोण बराबर हैं।
no | नहीं
24 | 因此，一共需要24天。
24 | 解：设共有x人，解得 x = 24。答：共有24人。
24 | 小明今年24岁。
24 | **答案：24**
24 | 答案是：**24**
24 | 最终结果为24元。
24 | 所以剩下24本书。
24 | 最后的答案应该是 24。
-3 | 所以x的值为-3。
\frac{3}{4} | 所以概率为 $\frac{3}{4}$。
\frac{3}{4} | 答案为3/4。
2\sqrt{3} | 因此 BC 的长为 $2\sqrt{3}$。
75% | 百分比是75%。
A | 因此，正确答案是A。
A | 正确答案为：A。
A | 答案：A
A | 本题选A。
A | 所以选A。
A | 故正确选项为A.
A | 答案是（A）。
A | 因此本题答案为 A 选项。
D | 综上，应选择D。
300立方厘米 | 体积是300立方厘米。
300 | 体积为 300 cm³。
2.5千克 | \boxed{2500克}
24 | Il y a donc 24 élèves.
24 | La réponse est donc 24.
24 | **Réponse : 24**
24 | Réponse finale : 24
24 | La solution est 24.
24 | On obtient donc $x = 24$.
24 | Le nombre total est de 24.
24 | La valeur de x est 24.
\frac{3}{4} | La probabilité est $\frac{3}{4}$.
A | La réponse est A.
A | Réponse : A
A | L'option correcte est A.
A | La bonne réponse est (A).
24 | Es gibt also 24 Schüler.
24 | Das Endergebnis ist 24.
24 | **Antwort:** 24
24 | Die endgültige Antwort ist 24.
24 | Der Wert von x ist 24.
24 | Insgesamt sind es 24.
24 | Die Anzahl beträgt somit 24.
\frac{3}{4} | Die Wahrscheinlichkeit beträgt $\frac{3}{4}$.
A | Antwort: A
A | Die richtige Lösung ist A.
A | Option A ist richtig.
A | Die Antwort ist also (A).
24 | **Respuesta:** 24
24 | Hay 24 estudiantes en total.
24 | En total son 24.
24 | El valor de x es 24.
24 | La respuesta final es 24.
24 | El número total es igual a 24.
\frac{3}{4} | La probabilidad es $\frac{3}{4}$.
A | Respuesta: A
A | La alternativa correcta es A.
A | La respuesta es la opción A.
24 | よって答えは24である。
24 | 合計で24個です。
24 | したがって、x = 24 です。
24 | 答え：**24**
24 | xの値は24です。
24 | 求める値は $24$ である。
A | 答えはAです。
A | 正解は（A）です。
A | 正解：A
24 | الجواب: 24
24 | إذن الإجابة النهائية هي 24.
24 | قيمة x هي 24.
24 | العدد الكلي هو ٢٤.
A | الإجابة الصحيحة: A
A | الجواب الصحيح هو (A).
24 | अंतिम उत्तर: 24
24 | कुल 24 छात्र हैं।
24 | अतः x का मान 24 है।
24 | उत्तर है 24।
A | सही उत्तर: A
A | सही उत्तर A है।
A | उत्तर (A)
18 | 由此可得，总共需要18米。
18 | 所以原来有18个。
18 | 阴影部分的面积为 $18$ 平方米。
18 | 【答案】18
18 | 因此最终答案为$\mathbf{18}$。
18 | 即所求的数为18。
C | 【答案】C
C | 综上所述，正确的选项是C。
C | 故答案选C。
C | 正确答案应该是C选项。
C | 本题答案为(C)。
18 | L'aire du rectangle vaut 18 cm².
18 | Le périmètre mesure 18 cm.
18 | Ainsi, il reste 18 pommes.
18 | Finalement, la valeur cherchée est $18$.
C | La réponse correcte est donc C.
C | La bonne réponse : C
18 | Das Volumen ist 18 Kubikzentimeter.
18 | Daher beträgt der Umfang 18 cm.
18 | Das gesuchte Ergebnis lautet 18.
18 | Lösung: $x = 18$
C | Richtige Antwort: C
C | Die Lösung ist Option C.
18 | El perímetro mide 18 cm.
18 | Por tanto, la respuesta es $18$.
18 | Así que quedan 18 manzanas.
18 | Solución: 18
C | Por lo tanto, la respuesta correcta es C.
C | La respuesta es (C).
18 | 面積は18cm²です。
18 | 最終的な答えは18です。
18 | 残りは18個になります。
C | 正解は選択肢Cです。
C | 正解はC。
18 | المحيط يساوي 18 سم.
18 | عدد التفاحات المتبقية هو 18.
18 | الحل: 18
C | الجواب هو C.
C | إذن الخيار الصحيح هو C.
18 | परिमाप 18 सेमी है।
18 | शेष सेब 18 हैं।
18 | इसलिए उत्तर 18 होगा।
C | सही जवाब C है।
C | विकल्प C सही है।
"""
INCORRECT = r"""
12 | 答案不是12。
12 | 面积不等于12。
12 | 面积是12或13。
12 | 答案是13，不是12。
12 | 答案是12到15之间。
12 | 面积大于12。
12 | \boxed{12以上}
12 | \boxed{12倍}
12平方厘米 | \boxed{12厘米}
12厘米 | \boxed{12米}
12厘米 | 答案是12千克。
5 | \boxed{5万}
B | 故选：C
B | 不选B。
B | B选项是错误的。
B | 故选：BC
B | 选项A和B。
no | 是
12 | La réponse n'est pas 12.
12 | La réponse est 12 ou 13.
12 | La réponse est 13, et non 12.
B | La réponse n'est pas B.
12 | L'aire est supérieure à 12.
12 | Die Antwort ist nicht 12.
12 | Die Antwort ist 12 oder 13.
12 | Die Antwort ist 13, nicht 12.
B | Die richtige Antwort ist nicht B.
12 | Die Fläche ist größer als 12.
12 | La respuesta no es 12.
12 | La respuesta es 12 o 13.
12 | La respuesta es 13, no 12.
B | La respuesta correcta no es B.
12 | 答えは12ではありません。
12 | 面積は12ではない。
12 | 答えは12または13です。
12 | 答えは13です。12ではない。
B | 正解はBではない。
12 | الإجابة ليست 12.
12 | الجواب هو 12 أو 13.
B | الإجابة الصحيحة ليست B.
12 | उत्तर 12 नहीं है।
12 | उत्तर 12 या 13 है।
B | सही विकल्प B नहीं है।
24 | 答案是25。
24 | 答案可能是24，也可能是25。
24 | 不能确定是24。
24 | 至少24人。
24 | 第24题
24 | 24减去12等于12。
24 | x的值不是24
24 | 最多有24个。
24cm | 24米。
A | 答案是B，而不是A。
A | A和B都对。
A | 选A或B。
A | A不对。
A | 排除A。
A | 除了A以外都正确。
24 | La réponse est 24x.
24 | Il y a au moins 24 élèves.
24 | Ce n'est pas 24.
24 | La réponse est entre 24 et 30.
A | L'option A est fausse.
A | Réponse : A ou B
24 | Es sind mindestens 24.
24 | Das Ergebnis ist nicht gleich 24.
24 | Die Antwort liegt zwischen 24 und 30.
A | Option A ist falsch.
A | Antwort A oder B
24 | No es 24.
24 | Hay al menos 24.
24 | La respuesta está entre 24 y 30.
A | La opción A es incorrecta.
A | Respuesta: A o B
24 | 24以上です。
24 | 答えは24ではない。
24 | 24から30の間です。
A | Aは正しくない。
A | 答えはAかBです。
24 | ليس 24.
24 | الجواب بين 24 و 30.
A | الخيار A خاطئ.
24 | उत्तर 24 से अधिक है।
24 | 24 नहीं।
A | विकल्प A गलत है।
18 | 面积约为18.5。
18 | 18不是方程的解。
18 | 需要18到20米。
18 | 比18大2。
18 | 原来有36个，是18的两倍。
C | C是错误的。
C | 答案为AC。
C | 正确的是A，而C错误。
18 | L'aire ne vaut pas 18.
18 | Il reste moins de 18 pommes.
18 | La réponse est 18 000.
C | La réponse C est incorrecte.
18 | Der Umfang ist nicht 18 cm.
18 | Es bleiben weniger als 18.
C | Antwort C ist nicht richtig.
18 | El perímetro no mide 18 cm.
18 | Quedan menos de 18.
C | La opción C no es correcta.
18 | 面積は18cmより大きい。
18 | 18ではありません。
C | 選択肢Cは間違いです。
18 | المحيط لا يساوي 18.
18 | أقل من 18.
C | الخيار C غير صحيح.
18 | परिमाप 18 से कम है।
C | विकल्प C सही नहीं है।
"""


def table(text):
    return [tuple(line.split(" | ")) for line in text.strip().splitlines()]


@pytest.mark.parametrize(("gold", "completion"), table(CORRECT))
def test_correct(gold, completion):
    assert verify(gold, completion)
    assert verify(gold, f"<think>1 + 1 = 3</think>{completion}")


@pytest.mark.parametrize(("gold", "completion"), table(INCORRECT))
def test_incorrect(gold, completion):
    assert not verify(gold, completion)


A_COLON = r"""
42 | We add them up.\n\nA: 42
42 | **A:** 42
42 | A: The sum is 42.
\frac{1}{2} | so we halve it\nA: $\frac{1}{2}$
"""


@pytest.mark.parametrize(("gold", "completion"), table(A_COLON))
def test_a_colon_is_a_place_one_may_add(gold, completion):
    completion = completion.replace(r"\n", "\n") + "\nThat is all I have to say about this one."
    assert verify(gold, completion, answer_in=(*PLACES[:3], "a_colon", "end"))
    assert not verify(gold, completion)
    assert not verify(gold, completion.replace("A:", "B:"), answer_in=("a_colon",))
