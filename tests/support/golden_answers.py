r"""The golden table: graded pairs, written for this project, by what they show.

ANSWERS are the content of a box, RESPONSES whole; each with a gold, in order (answer, gold).
SYMBOLIC pairs are wrong to the exact verifier, and right or wrong to math-verify as said.
"""

CORRECT = {
    "gsm8k: a plain integer": [
        ("42", "42"), ("0", "0"), ("-7", "-7"), (" 42 ", "42"), ("42.", "42"), ("42.0", "42"),
        ("+42", "42"), ("- 5", "-5"), ("42\n", "42"), ("{42}", "42"), ("(42)", "42"),
    ],
    "gsm8k: thousands": [
        ("1,000", "1000"), ("1000", "1,000"), ("1{,}000", "1000"), (r"1\,000", "1000"),
        (r"10,\!000", "10000"), ("12,345,678", "12345678"), ("2,500.50", "2500.5"),
        (r"1{,}000{,}000", "1,000,000"), ("-1,200", "-1200"),
    ],
    "gsm8k: money": [
        (r"\$18", "18"), ("$18", "18"), (r"\$18.00", "18"), ("18 dollars", "18"),
        (r"18 \text{ dollars}", r"\$18"), (r"\$1{,}250", "1250"), (r"\$70,000", "70000"),
        (r"-\$5", "-5"), ("€3", "3"), ("20 USD", r"\$20"), ("$18$", "18"), (r"\(18\)", "18"),
    ],
    "gsm8k: units": [
        ("42 apples", "42"), (r"42 \text{ apples}", "42"), (r"5\text{ cm}", "5"), ("5cm", "5 cm"),
        ("5 km", "5 kilometers"), (r"12 \mathrm{~cm}", "12"), (r"90^\circ", "90"), ("90°", "90"),
        (r"90^{\circ}", r"90^\circ"), ("90 degrees", r"90^\circ"), (r"30\ \text{minutes}", "30"),
        (r"18 \text{ m/s}", "18"), ("18 miles per hour", "18"), (r"6 \text{ cm}^2", "6"),
        ("6 square inches", r"6\text{ in}^2"), (r"64\text{ cubic feet}", "64"), ("3 hours", "3"),
        (r"2.5 \text{ liters}", r"\frac52"), ("1 hour", "1 hours"), ("7 days.", "7"),
    ],
    "gsm8k: percent": [
        ("50%", "50"), (r"50\%", "50"), ("50", r"50\%"), (r"50\%", "0.5"), ("0.5", r"50\%"),
        (r"\frac12", r"50\%"), (r"12.5\%", "12.5"), ("50 percent", "50"), (r"50\%", "50%"),
    ],
    "AIME: leading zeros": [
        ("073", "73"), ("73", "073"), ("007", "7"), ("000", "0"), ("73", "73.0"),
    ],
    "AMC: floats": [
        ("27", "27.0"), ("27.0", "27.0"), ("0.5", ".5"), ("1/2", "0.5"), ("36.0", "36"),
    ],
    "MATH: fractions": [
        (r"\frac{1}{2}", "0.5"), (r"\dfrac{1}{2}", r"\frac{1}{2}"), (r"\tfrac{3}{4}", "3/4"),
        (r"\frac{3}4", "0.75"), (r"-\frac{12}5", "-2.4"), ("\u22125", "-5"),
        ("(\u22121, 2)", "(-1,2)"), (r"\frac12", r"\frac{1}{2}"), (r"\frac 34", "3/4"),
        (r"\frac1{2}", "1/2"), ("2/4", "1/2"),
        (r"-\frac{1}{2}", r"\frac{-1}{2}"), (r"\frac{1}{-2}", "-1/2"), ("6/3", "2"),
        ("1 / 3", "1/3"),
        (r"2\frac{1}{2}", "2.5"), ("2 1/2", "5/2"), (r"-1\frac{1}{4}", "-1.25"),
        ("3/6", r"\frac{2}{4}"),
        (r"\frac{14}{4}\text{ cm}", "3.5"), (r"\left(\frac12\right)", "0.5"),
        (r"\cfrac{7}{8}", "7/8"),
    ],
    "MATH: the same text in another spelling": [
        (r"2\sqrt{3}", r"2 \sqrt{3}"), (r"2\sqrt3", r"2\sqrt{3}"), ("x^{2}+1", "x^2 + 1"),
        (r"\dfrac{\pi}{2}", r"\frac{\pi}{2}"), ("3x+1", "3x + 1"), (r"\pi r^2", r"\pi  r^{2}"),
        (r"x \le 3", r"x \leq 3"), (r"\text{even}", "even"), ("Evelyn", r"\text{Evelyn}"),
        (r"p-q", "p - q"), ("a_{1}", "a_1"), (r"x\in[1,2]", r"x \in [1, 2]"),
        (r"\infty", r"\infty"),
        (r"\left|x\right|", "|x|"), (r"$x+1$", "x+1"), (r"\[x+1\]", "x+1"), ("$$7$$", "7"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    ],
    "MATH: tuples, intervals, sets": [
        ("(3,4)", "(3, 4)"), (r"\left(3, \frac{1}{2}\right)", "(3, 0.5)"), ("(0,1]", "( 0, 1 ]"),
        (r"\left(3, \frac{\pi}{2}\right)", r"(3,\dfrac{\pi}{2})"), ("[-2,7]", "[-2, 7]"),
        (r"(-\infty, 0.5)", r"\left(-\infty,\frac12\right)"), ("1,2,3", "3, 1, 2"),
        (r"\{1,2\}", r"\left\{ 2, 1 \right\}"), ("1, 2", r"\{1,2\}"), ("-3, 5", "5,-3"),
        (r"[0,1)\cup(2,3]", r"[0, 1) \cup (2, 3]"), ("((1,2),(3,4))", "((1, 2), (3, 4))"),
        (r"(\text{A}, 7)", "(A,7)"), (r"\{0.5\}", r"\{\frac12\}"),
    ],
    "choices": [
        ("C", "C"), ("(C)", "C"), (r"\text{C}", "C"), (r"\text{(C)}", "C"), (r"\textbf{(C)}", "C"),
        ("(c)", "C"), (r"\text{c}", "(C)"), ("C.", "C"), (r"\mathrm{(B)}", r"\text{B}"),
        ("$D$", "D"),
    ],
}  # fmt: skip

WRONG = {
    "another number": [
        ("41", "42"), ("-42", "42"), ("420", "42"), ("42.0001", "42"), ("0.3333333333", "1/3"),
        ("18446744073709551617", "18446744073709551616"), ("1/2", "1/3"), ("1.000", "1000"),
        ("0.333", r"\frac13"), ("3.14159265", r"\pi"), ("1.41421356", r"\sqrt2"),
    ],
    "an expression where a literal is asked": [
        ("6*7", "42"), (r"6\cdot 7", "42"), (r"6\times7", "42"), ("40+2", "42"), ("2^3", "8"),
        ("84/2/1", "42"), (r"\frac{6\cdot7}{1}", "42"), (r"\sqrt{4}", "2"), ("5!", "120"),
        (r"\sum_{k=1}^{6} 7", "42"), ("41=42", "42"), ("123+456", "579"), ("--7", "7"),
        ("2**3", "8"),
        (r"\frac{84}{2}+0", "42"), ("1e3", "1000"), ("0x2A", "42"),
        (r"\frac{\frac{1}{2}}{1}", "0.5"),
    ],
    "two answers": [
        ("41, 42", "42"), (r"41 \text{ or } 42", "42"), ("42 or 41", "42"), (r"\pm 42", "42"),
        ("42, 42", "42"), ("41 42", "42"), ("1,2", "(1,2)"), ("40-42", "42"),
    ],
    "separators that are none": [
        ("1,00", "100"), ("1,0000", "10000"), ("1 000", "1000"), ("1_000", "1000"),
        ("10,00,000", "1000000"),
    ],
    "a word that changes the number": [
        ("7 million", "7"), ("3 dozen", "3"), (r"5\text{ thousand}", "5"), ("2 pi", "2"),
        ("4 squared", "4"),
        ("3 factorial", "3"), (r"5 \text{ hundredths}", "5"), ("2 times 3", "2"),
        ("1011 base two", "1011"),
        ("5 percent of 10", "5"),
    ],
    "a variable is no unit": [
        ("5x", "5"), ("5 x", "5"), ("5 m", "5"), ("3i", "3"), (r"3\mathrm{i}", "3"),
        (r"2\pi", "2"), ("6 xyz", "6"),
        (r"3\text{x}", "3"), ("42_8", "42"), (r"4\mathbf{j}", "4"),
    ],
    "another unit": [
        ("5 m", "5 cm"), (r"5\text{ m}", r"5\text{ cm}"), ("5 hours", "5 minutes"),
        ("$5", "5 euros"),
        (r"6\text{ cm}^2", r"6\text{ cm}^3"), ("50 cents", r"\$50"),
    ],
    "percent of something else": [
        ("0.5%", "50"), (r"5\%", "50"), ("5", r"50\%"), (r"50\%", "5000"), ("1/2%", r"50\%"),
        ("50%%", "50%"),
        ("50%", "50 cm"), ("50%", "0.5 cm"),
    ],
    "another text": [
        ("x+2", "x+1"), ("q-p", "p-q"), ("Evelyn", "Carla"), (r"\pi r", r"\pir"), ("1 2", "12"),
        ("x", "X"),
        ("c", "C"), ("B", "C"), ("(B)", "C"), ("CC", "C"), ("yes", "no"), ("(C", "C"),
        ("inf", "Infinity"),
    ],
    "other brackets, order or length": [
        ("(4,3)", "(3,4)"), ("[3,4]", "(3,4)"), ("(3,4]", "(3,4)"), ("(3,4,5)", "(3,4)"),
        ("1,2", "1,2,3"),
        (r"\{1,2\}", "(1,2)"), ("[0,1]", r"[0,1]\cup[2,3]"), ("1,1,2", "1,2"), ("(1,234)", "1234"),
        ("((1,2),3)", "(1,2,3)"),
    ],
    "division by zero, and what is no number": [
        ("1/0", "0"), (r"\frac{1}{0}", "0"), ("nan", "0"), ("0/0", "1"),
        (r"1\frac{3}{2}", "2.5"), ("1/", "1"),
        (r"2\frac{0}{3}", "2"),
    ],
    "characters that look like others": [
        ("\uff14\uff12", "42"), ("\u0664\u0662", "42"), ("\u00bd", "1/2"), ("4\u20602", "42"),
        ("4\x002", "42"), ("\u202e24", "42"), ("\ud800", "42"), ("\u00b2", "2"),
    ],
    "code": [
        ("__import__('os').system('touch hacked')", "0"), ("exec('x')", "42"), ("lambda: 42", "42"),
        (r"\input{/etc/passwd}", "42"), ("int('42')", "42"), ("True", "1"),
    ],
    "too much to compute": [
        ("9**9**9", "9"), ("9^{9^{9^9}}", "9"), ("1000000!", "0"), (r"\gcd(2^{10000000},6)", "2"),
        ("9" * 512, "9"), ("(" * 500, "1"), ("1e999999999", "1"), ("0" * 65 + "7", "7"),
    ],
}  # fmt: skip

RESPONSES = {
    "correct": {
        "text around the box": [
            (r"6*7=42. So \boxed{42}.", "42"), (r"\boxed{42} Done.", "42"),
            (r"\[\boxed{42}\]", "42"),
            (r"$\boxed{\frac{1}{2}}$", "0.5"), (r"\boxed{\text{(C)}}", "C"),
        ],
        "the last closed box counts": [
            (r"\boxed{41} no, \boxed{42}", "42"), (r"\boxed{42} or \boxed{41", "42"),
            (r"\boxed{1+\boxed{42}}", "42"), (r"\boxed{\{1,2\}}", r"\{2,1\}"),
        ],
        "after thinking": [
            (r"<think>\boxed{41}</think>\boxed{42}", "42"), (r"\boxed{41}</think>\boxed{42}", "42"),
            (r"<think></think>\boxed{42}", "42"),
        ],
    },
    "wrong": {
        "a box after the right one": [
            (r"\boxed{42} or \boxed{41}", "42"), (r"\boxed{41} The final answer is $42$.", "42"),
            (r"<think>\boxed{42}</think>\boxed{41}", "42"),
        ],
    },
    "no_answer": {
        "no closed box after thinking": [
            ("", "42"), ("42", "42"), ("6*7 = 42. Wait, maybe I should", "42"),
            (r"\boxed{42", "42"),
            (r"\boxed42", "42"), (r"\boxed{}", "42"), (r"\boxed{ }", "42"), ("#### 42", "42"),
            (r"<think>\boxed{42}</think> so answer 41", "42"), (r"<think>\boxed{42}", "42"),
            (r"\boxed{41}</think><think>\boxed{42}", "42"), (r"\boxed{42\}", "42"),
            (r"\Boxed{42}", "42"),
            (r"\boxed{" + "4" * 513 + "}", "4" * 513), (r"\boxed{" * 5000, "42"),
        ],
    },
    "not_scored": {
        "a gold that can't be compared with": [
            (r"\boxed{42}", ""), (r"\boxed{42}", "  "), (r"\boxed{42}", "$$"),
            (r"\boxed{42}", "4" * 513),
        ],
    },
}  # fmt: skip

FLEXIBLE = [
    (r"\boxed{42} #### 41", "42", "42"), ("6*7=42\n#### 42", "42", "42"),
    ("#### 41\n#### 42 ", "42", "42"),
    ("6*7 = 42. Wait, maybe I should", "42", "42"), ("The answer is 1,234.", "1,234", "1234"),
    ("so -3/4 of it", "-3/4", "-0.75"), ("<think>7</think>The answer is 8", "8", "8"),
    ("10-3 is 7", "7", "7"),
    ("x2 and y3", None, "3"), ("<think>42", None, "42"), ("no number", None, "42"),
    ("####\n", None, "42"),
    ("3.5.", "3.5", "3.5"), ("costs $18", "18", "18"), ("####" + " " * 600, None, "42"),
]  # fmt: skip

SYMBOLIC = {
    "correct": [
        (r"\sqrt{12}", r"2\sqrt{3}"), ("-q+p", "p-q"), ("(x+1)^2", "x^2+2x+1"),
        (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}"),
        ("-5i+6", "6-5i"), (r"(3, \pi/2)", r"(3,\frac{\pi}{2})"), ("1024", "2^{10}"),
        (r"x\cdot 3", "3x"),
        (r"\begin{bmatrix}1\\2\end{bmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
        ("y=2x+3", "2x+3"),
    ],
    "wrong": [
        (r"\sqrt{13}", r"2\sqrt{3}"), ("q-p", "p-q"), ("1/0", "2x"), ("banana", r"\sqrt{2}"),
        ("", r"\sqrt{2}"),
        (r"6\cdot7", "42"), (r"\sum_{k=1}^{6}7", "42"), (r"\int_0^x 2t\,dt", "x^2"), ("B", "C"),
        ("Carla", "Evelyn"),
    ],
}  # fmt: skip


def flat(table):
    return [(why, *pair) for why, pairs in table.items() for pair in pairs]
