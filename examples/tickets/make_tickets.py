"""Write the example data set: support messages, and what a help desk would note about each.

    python examples/tickets/make_tickets.py [FOLDER]

writes rows/tickets.jsonl and more_tickets.jsonl, always the same bytes. A line is a conversation:
instruction, message, and a JSON object with `team`, `urgency` and `product`.
"""

import json
import random
import sys
from itertools import pairwise
from pathlib import Path

INSTRUCTION = (
    "Sort the customer's message. Answer with a JSON object: team (accounts, billing, delivery, "
    "repairs or sales), urgency (low, normal or high) and product (null when none is named)."
)

# fmt: off
# What a product is called in a message, the first being how it is noted down.
PRODUCTS = [
    ["kettle", "electric kettle", "water kettle"],
    ["headset", "wireless headset", "gaming headset"],
    ["vacuum cleaner", "hoover", "vacuum"],
    ["desk lamp", "reading lamp", "lamp for the desk"],
    ["coffee machine", "coffee maker", "espresso machine"],
    ["smart watch", "smartwatch", "fitness watch"],
    ["bike light", "bicycle light", "front light for my bike"],
    ["air purifier", "air cleaner", "room air purifier"],
    ["tablet", "ten-inch tablet", "tablet computer"],
    ["hair dryer", "hairdryer", "blow dryer"],
    ["toaster", "two-slice toaster", "bread toaster"],
    ["keyboard", "wireless keyboard", "mechanical keyboard"],
]
MORE_PRODUCTS = [
    ["e-reader", "e-book reader", "ebook reader"],
    ["rice cooker", "small rice cooker", "electric rice cooker"],
    ["router", "wifi router", "wireless router"],
    ["fan heater", "space heater", "little fan heater"],
]

WHEN = ["on Monday", "last Tuesday", "three days ago", "yesterday", "at the weekend",
        "last month", "two weeks ago", "in spring", "on the 4th", "on the 19th",
        "before the holidays"]
SINCE = ["since Monday", "since last Tuesday", "for three days", "since yesterday",
         "since the weekend", "for a month", "for two weeks", "since the 4th", "since the 19th"]
COLOURS = ["black", "white", "green", "red", "grey", "dark blue", "yellow"]
AMOUNTS = ["18", "24.90", "39", "47.50", "62", "85", "119", "140.20"]
NUMBERS = ["2", "3", "4", "5", "6", "8", "10", "12"]
PLACES = ["my neighbour's house", "the old flat", "my office", "a shop around the corner",
          "my sister's address", "the house next door", "a depot miles away"]
PARTS = ["switch", "cable", "lid", "handle", "battery", "button", "filter", "plug", "hinge"]

# {p} is a product; a problem without it leaves the product open.
FIRST = {
    "problem": {
        "billing": [
            "I was charged twice for the {p} that I bought {when}.",
            "My bank shows {amount} euros for the {p}, but the price on your page was lower.",
            "The invoice for my {p} still has my old address on it. Can I get a new one?",
            "I sent the {p} back {when} and have not seen the refund.",
            "The discount code did not work when I paid for the {p}, so I lost {amount} euros.",
            "Why is there a fee of {amount} euros on my bill from {when}?",
            "I need a receipt with tax shown for the order I paid {when}.",
            "Your reminder says that I owe {amount} euros. I paid {when}, by bank transfer.",
            "Could I pay for the {p} in {number} instalments after all?",
        ],
        "delivery": [
            "The {p} I ordered {when} has not arrived.",
            "Your driver left the {p} at {place}, and now nobody knows where it is.",
            "Tracking has said 'out for delivery' {since}, but there is no {p} here.",
            "I got a {colour} {p} although I had ordered a {colour2} one.",
            "The box with the {p} was torn open when it came {when}.",
            "Can you send my order to {place} instead? It has not left your warehouse yet.",
            "Only {number} of the parcels in my order came {when}. Where is the rest?",
            "I will be away for {number} days. Could the {p} come after that?",
            "The courier wrote that I was not at home {when}. I was, all day long.",
        ],
        "repairs": [
            "The {p} stopped working {when}.",
            "There is smoke coming out of my {p} when I switch it on!",
            "The {part} of my {p} broke off after {number} weeks.",
            "My {p} has made a loud grinding noise {since}.",
            "Is the {part} of the {p} covered by the warranty? Mine is worn out.",
            "The {p} turns itself off after {number} minutes.",
            "I gave you the {p} for repair {when} and it has the same fault again.",
            "Water got into the {p} {when} and now the {part} is stuck.",
            "Where can I buy a spare {part} for the {p}?",
        ],
        "accounts": [
            "I have not been able to log in {since}. It says that my password is wrong.",
            "Please change the email address of my account; I lost the old one {when}.",
            "Somebody logged in to my account {when}, and it was not me.",
            "The link for a new password never comes, I tried {number} times.",
            "I would like to have my account and all my data deleted.",
            "I have {number} accounts by mistake. Can you make one of them?",
            "The code that you text me has been refused {since}.",
            "How do I stop your newsletter? I have unsubscribed {number} times.",
        ],
        "sales": [
            "Do you have the {p} in {colour}?",
            "Will the {p} be back in stock soon? It was sold out {when}.",
            "Is there a better price for the {p} when a school takes {number}?",
            "Is the {part} of the {p} made of metal or of plastic?",
            "How heavy is the {p}? I could not find it on your page {when}.",
            "Which {p} would you suggest for a small flat, up to {amount} euros?",
            "Does the {p} come with a spare {part}?",
            "Do you sell gift cards worth {amount} euros?",
            "Is the {colour} {p} the same size as the {colour2} one?",
        ],
    },
    "opener": ["", "", "", "Hello,", "Hi there.", "Good morning!", "Dear team,", "Hey,",
               "Hello again.", "Good evening,", "To whom it may concern:"],
    "mood": [
        "", "", "", "", "I am rather disappointed.", "I like your shop otherwise.",
        "This is the second time that I write.", "I hope that you can help me.",
        "Honestly, I expected better.", "Nobody answered the phone.",
        "My order number ends in {number}{number2}.",
        "I have been a customer for {number} years.", "My children are sad about it.",
        "I read your help pages and found nothing.",
    ],
    "low": ["No hurry.", "There is no rush.", "Whenever you find the time.",
            "It can wait until next week.", "I am only wondering.",
            "Take your time with this."],
    "high": ["This is urgent!", "I need an answer today.", "Please call me back at once.",
             "I cannot wait any longer.", "It has to be solved by tonight.",
             "Please treat this as an emergency."],
    "closer": ["", "", "", "Thanks.", "Thank you very much!", "Kind regards", "Best wishes",
               "Cheers", "Thanks in advance", "Yours faithfully"],
}

# The second batch: other customers, who say it in other words, and some new products.
SECOND = {
    "problem": {
        "billing": [
            "You took {amount} euros from my card {when}, and then the same for the {p} again.",
            "According to my statement the {p} cost {amount} euros more than agreed.",
            "I am still waiting for my money back after returning the {p} {when}.",
            "Please issue the bill for the {p} to my company and not to me.",
            "My voucher over {amount} euros was ignored at the checkout.",
            "I got a dunning letter {when} for something that was settled long ago.",
        ],
        "delivery": [
            "Still no sign of the {p} that I paid for {when}.",
            "The postman handed my {p} to {place} without asking.",
            "What turned up {when} was a {colour} {p}. Mine was meant to be {colour2}.",
            "The parcel was soaked through, and the {p} inside as well.",
            "Half of my shipment is missing: {number} items were packed, says the note.",
            "I have moved. Can the {p} be redirected to {place}?",
        ],
        "repairs": [
            "My {p} has been dead {since}, not even the {part} reacts.",
            "I smell burning plastic when the {p} is running.",
            "After {number} months the {part} on the {p} has come loose.",
            "The {p} came back from your workshop {when} in a worse state than before.",
            "Do I have a guarantee on the {part}? The {p} is {number} months old.",
            "Every {number} minutes the {p} beeps and restarts.",
        ],
        "accounts": [
            "The website throws me out whenever I sign in, first noticed {when}.",
            "A stranger seems to use my profile; orders from {when} are not mine.",
            "My phone number is out of date, and I cannot get past the security code.",
            "Kindly erase everything that you have stored about me.",
            "I typed the reset code {number} times and it is never accepted.",
        ],
        "sales": [
            "Is there any {p} that fits on a shelf of {number}0 centimetres?",
            "Would the {colour} {p} be cheaper if we took {number} of them?",
            "When do you expect new stock of the {p}? The page has said 'soon' {since}.",
            "Can the {part} be exchanged on the {p}, before I decide to buy it?",
            "Is there a student price for the {p}?",
            "How does the {p} differ from the one for {amount} euros?",
        ],
    },
    "opener": ["", "", "", "Greetings,", "Good day.", "Hi folks,", "Hello support,", "Excuse me,",
               "Dear all,"],
    "mood": [
        "", "", "", "What a pity.", "I had recommended you to friends.",
        "I have photos if you need them.",
        "Chat was no help at all.", "The reference is {number}-{number2}.",
        "I trust that we can sort it out.",
        "My patience has limits.", "We are a household of {number}.",
    ],
    "low": ["Nothing pressing.", "Any day will do.", "Answer when it suits you.",
            "It is not important.", "Just out of curiosity."],
    "high": ["Reply immediately, please.", "It cannot wait until tomorrow.",
             "I need this fixed right now.", "Time is running out for me.",
             "Please act within the hour."],
    "closer": ["", "", "", "Many thanks", "With best regards", "Much obliged", "Sincerely", "Bye"],
}
# fmt: on

DANGEROUS = ("smoke", "burning", "Somebody logged in", "A stranger")  # urgent without saying so


class Maker:
    """Makes messages that are told apart by more than a few letters."""

    def __init__(self, seed):
        self.random = random.Random(seed).random  # the one method that no version changes
        self.known = []

    def pick(self, choices):
        return choices[int(self.random() * len(choices))]

    def ticket(self, team, words, products):
        """A conversation, with a message unlike those before it."""
        while True:
            urgency = self.pick(["low", "normal", "normal", "high"])
            problem = self.pick(words["problem"][team])
            product = self.pick(products)
            hurry = self.pick(words[urgency]) if urgency != "normal" else ""
            if any(sign in problem for sign in DANGEROUS):
                urgency, hurry = "high", self.pick(["", *words["high"]])
            middle = [self.pick(words["mood"]), hurry]
            if self.random() < 0.5:
                middle.reverse()
            parts = [self.pick(words["opener"]), problem, *middle, self.pick(words["closer"])]
            message = self.filled(" ".join(filter(None, parts)), self.pick(product))
            if self.is_new(message):
                break
        noted = {
            "team": team,
            "urgency": urgency,
            "product": product[0] if "{p}" in problem else None,
        }
        return {
            "messages": [
                {"role": "system", "content": INSTRUCTION},
                {"role": "user", "content": self.careless(message)},
                {"role": "assistant", "content": json.dumps(noted)},
            ]
        }

    def filled(self, template, product):
        colour = int(self.random() * len(COLOURS))
        return template.format(
            p=product,
            when=self.pick(WHEN),
            since=self.pick(SINCE),
            amount=self.pick(AMOUNTS),
            number=self.pick(NUMBERS),
            number2=self.pick(NUMBERS),
            place=self.pick(PLACES),
            part=self.pick(PARTS),
            colour=COLOURS[colour],
            colour2=COLOURS[colour - 1],
        )

    def is_new(self, message):
        """Whether it shares fewer than two thirds of its word pairs with every other message."""
        words = message.lower().split()
        pairs = set(pairwise(words))
        if any(3 * len(pairs & other) >= 2 * len(pairs | other) for other in self.known):
            return False
        self.known.append(pairs)
        return True

    def careless(self, message):
        """The message as some people type it."""
        if self.random() < 0.2:
            message = self.misspelt(message)
        if self.random() < 0.15:
            message = message.lower()
        if self.random() < 0.1:
            message = message.replace(".", "").replace(",", "")
        if self.random() < 0.05:
            message = message.upper()
        return message

    def misspelt(self, message):
        """Two letters of one word in the wrong order, or one of them left out."""
        words = message.split(" ")
        long = [i for i, word in enumerate(words) if len(word) > 4 and word.isalpha()]
        number = self.pick(long)
        word, at = words[number], 1 + int(self.random() * (len(words[number]) - 3))
        swapped = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
        words[number] = swapped if self.random() < 0.6 else word[:at] + word[at + 1 :]
        return " ".join(words)


def write(file, tickets):
    text = "".join(json.dumps(ticket, ensure_ascii=False) + "\n" for ticket in tickets)
    file.write_text(text, encoding="utf-8", newline="\n")


def main(folder):
    teams = list(FIRST["problem"])
    maker = Maker(seed=1)
    first = [maker.ticket(teams[i % 5], FIRST, PRODUCTS) for i in range(300)]
    second = [maker.ticket(teams[i % 5], SECOND, PRODUCTS + MORE_PRODUCTS) for i in range(150)]
    (folder / "rows").mkdir(exist_ok=True)
    write(folder / "rows" / "tickets.jsonl", first)
    write(folder / "more_tickets.jsonl", second)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
